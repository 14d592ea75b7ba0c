"""Tasks of Self-Instruct (arXiv 2212.10560): read from seeds, asked for in words, and read from what a model wrote.

The questions are asked through the model's chat template and shown by example: seed tasks are earlier turns, and where a list is
to be continued the assistant's turn is begun with its next number, so that a base model knows what comes as well.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Iterable, Sequence

from jaxreason.data.chunks import Item
from jaxreason.data.example import Example, Reject, split_thought
from jaxreason.data.sources import open_source
from jaxreason.data.tally import Tally, reasons
from jaxreason.errors import UserError

MORE = 8  # new tasks that one list is asked for
_NUMBER = re.compile(r"[\s>*_#]*(?:task )?([0-9]{1,4}) ?[*_]*[.):][*_]*(?:\s+|$)", re.IGNORECASE)
_MARK = re.compile(
    r"[\s>*_#-]*(?:(example|class label|label|input|output) ?#?[0-9]*[*_]*[:.][*_]*|(example) ?#?[0-9]+[*_]*\s*$)\s*",
    re.IGNORECASE,
)  # fmt: skip
_VERDICT = re.compile(r"[^\w]*(yes|no)\b", re.IGNORECASE)
_ALONE = "(none)"


@dataclasses.dataclass(frozen=True)
class Instance:
    """What a task is given, which may be nothing (""), and what answers it."""

    input: str
    output: str


@dataclasses.dataclass(frozen=True)
class Task:
    """An instruction with what is known of it."""

    id: str
    instruction: str
    instances: tuple[Instance, ...] = ()
    classification: bool | None = None  # whether its outputs are a few labels; None: nobody said


# ---- seeds


def read_seeds(source: str, split: str, max_rows: int | None, seed: int) -> tuple[list[Task], dict[str, int]]:
    """Tasks of ``source``: rows with ``instruction`` (or ``prompt``), and what they have of ``id``, ``name``, ``instances``
    (``[{input, output}]``), ``input`` and ``output``, ``is_classification``; and why other rows are none. Raises UserError where
    no row is usable."""
    tally, found, known = Tally(), list[Task](), set[str]()
    for chunk in open_source(source, split, max_rows, seed).chunks():
        for key, item in chunk.rows():
            if tally.rows == max_rows:
                break
            tally.rows += 1
            try:
                task = _seed(item, f"seed_{tally.rows - 1}")
                if task.instruction in known or task.id in {other.id for other in found}:
                    raise Reject("the same instruction or id as an earlier row")
                known.add(task.instruction)
                found.append(task)
            except Reject as reject:
                tally.reject(reject, functools.partial(chunk.place, key))
    if not found:
        told = reasons(tally.dropped, tally.first_dropped)
        raise UserError(
            f"--seeds {source}: no usable task in {tally.rows} rows {told}; a row needs a text in instruction or prompt"
        )
    return found, tally.dropped


def _seed(item: Item, name: str) -> Task:
    if isinstance(item, Reject):
        raise item
    if isinstance(item, Example):
        raise Reject("a program's problem is no task; give a file")
    instruction = _text(item.get("instruction")) or _text(item.get("prompt"))
    if not instruction:
        raise Reject("no text in instruction or prompt", f"it has {', '.join(map(str, list(item)[:12])) or 'no columns'}")
    rows = item.get("instances")
    rows = rows if isinstance(rows, list) else [item]
    pairs = [Instance(_text(row.get("input")), _text(row.get("output"))) for row in rows if isinstance(row, dict)]
    label = item.get("is_classification")
    kept = tuple(pair for pair in pairs if pair.output)
    return Task(_text(item.get("id")) or name, instruction, kept, label if isinstance(label, bool) else None)


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


# ---- what is asked


def asks_for_tasks(shown: Sequence[Task]) -> tuple[Example, str]:
    """The question for new tasks after those shown, and how the answer begins: with the next number of the list."""
    first = len(shown) + 1
    listed = "\n".join(f"{i}. {_line(task.instruction)}" for i, task in enumerate(shown, 1))
    return Example(
        f"Here are {len(shown)} tasks for an assistant that reads and writes text:\n{listed}\n\nGo on with {MORE} more tasks, "
        f"numbered {first} to {len(shown) + MORE}, one on a line. Each should be of another kind than all others."
    ), f"{first}."


def asks_for_kind(task: Task, shots: Sequence[Task]) -> Example:
    """The question whether a task is one of classification, after ``shots``, of which it is known."""

    def words(one: Task) -> str:
        return f"Is every right answer to this task one of a small fixed set of labels? Say Yes or No.\nTask: {one.instruction}"

    return Example(words(task), history=_turns([(words(one), "Yes" if one.classification else "No") for one in shots]))


def asks_for_instances(task: Task, classification: bool, shots: Sequence[Task], count: int) -> Example:
    """The question for instances of a task: inputs first or, for classification, labels first, so that all labels occur.

    ``shots`` are of the same kind and have instances.
    """
    form = "Class label: one of the labels\nInput: a text with it" if classification else "Input: …\nOutput: …"
    alone = "" if classification else f" Where a task needs no input, its input is {_ALONE}."

    def words(one: Task) -> str:
        return (
            f"Task: {one.instruction}\nWrite up to {count} different examples of this task with their right answers, each in "
            f"this form:\n{form}\nWrite nothing else.{alone}"
        )

    told = [(words(one), "\n\n".join(_written(pair, classification) for pair in one.instances[:count])) for one in shots]
    return Example(words(task), history=_turns(told))


def _written(pair: Instance, classification: bool) -> str:
    if classification:
        return f"Class label: {pair.output}\nInput: {pair.input or _ALONE}"
    return f"Input: {pair.input or _ALONE}\nOutput: {pair.output}"


def _turns(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(turn for asked, said in pairs for turn in (("user", asked), ("assistant", said)))


def _line(text: str) -> str:
    return " ".join(text.split())


# ---- what is read


def numbered(text: str, first: int, last: int) -> tuple[list[str], bool]:
    """Items ``first`` to ``last`` of a numbered list (``9. …``, ``9) …``, ``**9.** …``, ``Task 9: …``), a line each in the end;
    and whether the text ends within the last of them.

    An item begins on a line of its own with a higher number than the one before; other numbers are part of its text. It ends at
    a blank line: what follows, up to the next number, is not of the list. The list ends where ``last`` + 1 follows ``last``.
    """
    items, at, open_item = list[list[str]](), first - 1, False
    for line in text.splitlines():
        match = _NUMBER.match(line)
        if match and at == last and int(match[1]) == last + 1:
            open_item = False
            break
        if match and at < int(match[1]) <= last:
            at, open_item = int(match[1]), True
            items.append([line[match.end() :]])
        elif not line.strip():
            open_item = open_item and not any(part.strip() for part in items[-1])
        elif open_item:
            items[-1].append(line)
    return [_line(" ".join(parts)) for parts in items], open_item


def kind(text: str) -> bool | None:
    """Whether an answer says that a task is one of classification; None where it says neither yes nor no."""
    match = _VERDICT.match(_said(text))
    return None if match is None else match[1].lower() == "yes"


def instances(text: str, classification: bool) -> list[Instance]:
    """Pairs of an answer to ``asks_for_instances``, in order; what comes before the first mark is left out.

    The next pair begins at ``Example``, at a mark that the pair has already, and at ``Input`` or, for classification, at the mark
    that was the first of all. A label is one line: what follows it is the input, marked or not. A pair without an output has "".
    """
    found, current, field = list[dict[str, list[str]]](), dict[str, list[str]](), ""
    opening = "" if classification else "input"
    for line in _said(text).splitlines():
        if not (match := _MARK.match(line)):
            if classification and field == "output" and line.strip():
                field = "input"
                current.setdefault(field, [])
            if field:
                current[field].append(line)
            continue
        name = (match[1] or match[2]).lower()
        field = "" if name == "example" else "output" if name.endswith("label") else name
        opening = opening or field
        if current and (not field or field in current or field == opening):
            found.append(current)
            current = {}
        if field:
            current[field] = [line[match.end() :]]
    pairs = [{name: "\n".join(lines).strip() for name, lines in one.items()} for one in [*found, current] if one]
    return [Instance(_given(one.get("input", "")), one.get("output", "")) for one in pairs]


def _said(text: str) -> str:
    """What follows the thought; nothing where the thought does not end."""
    try:
        return split_thought(text)[1]
    except Reject:
        return ""


def _given(text: str) -> str:
    return "" if text.lower().strip("().* ") in ("none", "no input", "n/a", "noinput", "<noinput>") else text


# ---- filters


def unfit(instruction: str, min_words: int, max_words: int, refused: Sequence[str]) -> str | None:
    """Why an instruction is left out, whatever the others are; None: it is not."""
    words = instruction.split()
    if not words:
        return "empty"
    if len(words) < min_words:
        return f"fewer than {min_words} words"
    if len(words) > max_words:
        return f"more than {max_words} words"
    if instruction[0] in string.punctuation:
        return "begins with punctuation"
    if re.match(r"[0-9]+[.):]", instruction):
        return "begins with a number of another list"
    if not instruction[0].isascii():
        return "begins with a letter that is not English"
    for word in refused:
        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", instruction, re.IGNORECASE):
            return "names what a model of text cannot do"
    return None


def sound(pairs: Sequence[Instance]) -> tuple[list[Instance], dict[str, int]]:
    """The usable instances of one instruction, and how many are not for which reason.

    Where one input has two outputs at least one is wrong, and nobody knows which instances are right: none is used.
    """
    kept, dropped = list[Instance](), dict[str, int]()

    def drop(reason: str, count: int = 1) -> None:
        dropped[reason] = dropped.get(reason, 0) + count

    for pair in pairs:
        if not pair.output:
            drop("no output")
        elif pair.output == pair.input:
            drop("the output repeats the input")
        elif pair.input.endswith(":") or pair.output.endswith(":"):
            drop("ends with a colon, as what is not finished does")
        elif pair in kept:
            drop("the same as another of its instruction")
        else:
            kept.append(pair)
    inputs = [pair.input for pair in kept if pair.input]
    if len(set(inputs)) < len(inputs):
        drop("of an instruction that answers one input in two ways", len(kept))
        kept = []
    return kept, dropped
