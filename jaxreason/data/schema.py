"""Row formats: how a row of each known data set becomes an Example.

A format is a detector over the columns of a row and a parser: one file may hold rows of several. Parsers raise Reject for a
row they cannot use; ``SCHEMAS`` lists the columns of each. Earlier assistant turns lose their thoughts, as they do when a
reasoning model is asked a second question.
"""

import functools
import json
import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from jaxreason.data.chunks import Item, Row
from jaxreason.data.example import Example, Reject, check, split_thought
from jaxreason.errors import UserError
from jaxreason.text import last_boxed

__all__ = ["HINTS", "SCHEMAS", "Example", "Reject", "Schema", "detect", "format_of", "known", "parse"]

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_CORRECTNESS = (
    "correct",
    "is_correct",
    "correctness",
    "deepseek_grade",
    "correctness_math_verify",
    "correctness_llama",
)
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
_UNKNOWN_FORMAT, _NO_CORRECTNESS = "columns match no known row format", "no column says whether it is correct"


class Schema(NamedTuple):
    detect: Callable[[Set[str]], bool]
    parse: Callable[[Row, bool], Example]
    columns: str  # for messages


def known(name: str) -> None:
    """Raises UserError for a ``data.schema`` that there is not."""
    if name != "auto" and name not in SCHEMAS:
        raise UserError(f"data.schema {name}: no such row format; known: auto, {', '.join(SCHEMAS)}")


def format_of(item: Item, schema: str) -> str:
    """The format of one row: ``schema``, or (``auto``) what its columns say. Raises Reject."""
    if isinstance(item, Reject):
        raise item
    if isinstance(item, Example):
        return "example"
    return detect(item) if schema == "auto" else schema


def detect(row: Row) -> str:
    """Name of the first format whose columns all hold something in this row, or else are there at all. Raises Reject.

    Tables give every row all columns, so that in a file of several formats a row's other columns are empty.
    """
    filled = tuple(column for column, value in row.items() if not _is_missing(value))
    name = _named(filled) or (_named(tuple(row)) if len(filled) < len(row) else None)
    if name is None:
        shown = ", ".join(str(column)[:40] for column in sorted(row)[:12]) or "(none)"
        raise Reject(_UNKNOWN_FORMAT, f"columns {shown}")
    return name


@functools.lru_cache(maxsize=1024)
def _named(columns: tuple[str, ...]) -> str | None:
    there = frozenset(columns)
    return next((name for name, schema in SCHEMAS.items() if schema.detect(there)), None)


def parse(item: Item, schema: str, keep_only_correct: bool) -> Example:
    """The row as an Example; with ``keep_only_correct`` only if a correctness column says so. Raises Reject."""
    if isinstance(item, Reject):
        raise item
    if isinstance(item, Example):
        return item
    # OpenR1 rows are judged per generation, inside their parser.
    if keep_only_correct and schema != "openr1":
        verdict = _verdict(item)
        if verdict is None:
            raise Reject("correctness unknown" if any(name in item for name in _CORRECTNESS) else _NO_CORRECTNESS)
        if not verdict:
            raise Reject("marked incorrect")
    return check(SCHEMAS[schema].parse(item, keep_only_correct))


# --- columns ---------------------------------------------------------------------------------------------------------


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if _is_missing(value):
        raise Reject(f"no {column}")
    if not isinstance(value, str):
        raise Reject(f"{column} is not text")
    if not value.strip():
        raise Reject(f"empty {column}")
    return value.strip()


def _optional(row: Row, column: str) -> str | None:
    value = row.get(column)
    return value.strip() or None if isinstance(value, str) else None


def _is_missing(value: Any) -> bool:
    """Null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def _gold(row: Row, *columns: str) -> str | None:
    """The first of ``columns`` that holds a text or a finite number, as text."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) or _is_number(value):
            text = str(value).strip()
            if text:
                return text
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"yes": True, "true": True, "correct": True, "1": True}.get(value.strip().lower(), False)
    return None if _is_missing(value) else bool(value)


def _verdict(row: Row) -> bool | None:
    for column in _CORRECTNESS:
        value = row.get(column)
        if isinstance(value, list):
            verdicts = [_truth(item) for item in value if not _is_missing(item)]
            value = any(verdicts) if verdicts else None
        if not _is_missing(value):
            return _truth(value)
    return None


def _flags(row: Row, column: str, count: int) -> list[bool | None]:
    values = row.get(column)
    return [_truth(value) for value in values] if isinstance(values, list) and len(values) == count else [None] * count


def _system(row: Row) -> str | None:
    """The system column, unless it asks for the tags that ``split_thought`` has just replaced by ``<think>``."""
    system = _optional(row, "system")
    return None if system is not None and "<|begin_of_thought|>" in system else system


# --- conversations ---------------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    role: str
    text: str
    thought: str | None = None  # of a field of its own
    field: str = ""


def _turns(row: Row, column: str, role_key: str, text_key: str) -> list[_Turn]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise Reject(f"{column} is empty or not a list")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
            raise Reject(f"{column} has a turn without {role_key}")
        said: str = turn[role_key]
        role = _ROLES.get(said, said)
        if role not in ("system", "user", "assistant"):
            raise Reject(f"role {role[:40]!r}")
        text = turn.get(text_key)
        if role == "system" and isinstance(text, str):
            turns.append(_Turn(role, text.strip()))  # an empty one says that there is no system message
        else:
            turns.append(_Turn(role, _text(turn, text_key), *(_thought(turn) if role == "assistant" else ())))
    return turns


def _thought(turn: Row) -> tuple[str | None, str]:
    """(thought, field) of an assistant's turn that has a field for it. Raises Reject where two of them disagree."""
    found: str | None = None
    name = ""
    for field in _THOUGHT_FIELDS:
        value = turn.get(field)
        if _is_missing(value):
            continue
        if not isinstance(value, str):
            raise Reject(f"{field} is not text")
        if (text := value.strip()) and found not in (None, text):
            raise Reject(f"{name} and {field} are different thoughts")
        found, name = (text, field) if text else (found, name)
    return found, name


def _split(turn: _Turn) -> tuple[str | None, str]:
    """(thought, answer) of an assistant's turn, whose thought is in tags or in a field of its own."""
    think, answer = split_thought(turn.text)
    if turn.thought is not None and think not in (None, turn.thought):
        raise Reject(f"{turn.field} is another thought than the one in tags")
    return (think if turn.thought is None else turn.thought), answer


def _conversation(turns: list[_Turn], system: str | None, gold: str | None) -> Example:
    if turns[0].role == "system":
        if system is not None and turns[0].text not in ("", system):
            raise Reject("the column system and the system turn differ")
        system = turns[0].text if system is None else system
        turns = turns[1:]
    if any(turn.role == "system" for turn in turns):
        raise Reject("system turn inside the conversation")
    think = answer = None
    if turns and turns[-1].role == "assistant":
        think, answer = _split(turns[-1])
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        raise Reject("last assistant turn follows no user turn")
    history = tuple((turn.role, _split(turn)[1] if turn.role == "assistant" else turn.text) for turn in turns[:-1])
    if system is not None and "<|begin_of_thought|>" in system:
        system = None
    return Example(turns[-1].text, answer, think, system, gold, history)


def _messages(row: Row, _: bool) -> Example:
    gold = _gold(row, "gold", "ground_truth", "expected_answer", "answer")
    return _conversation(_turns(row, "messages", "role", "content"), _system(row), gold)


def _conversations(row: Row, _: bool) -> Example:
    turns = row.get("conversations")
    named = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]
    keys = ("role", "content") if named else ("from", "value")
    gold = _gold(row, "gold", "ground_truth", "expected_answer", "answer")
    return _conversation(_turns(row, "conversations", *keys), _system(row), gold)


def _prompt_completion(row: Row, _: bool) -> Example:
    gold = _gold(row, "gold", "ground_truth", "answer")
    if isinstance(row.get("prompt"), list):
        turns = _turns(row, "prompt", "role", "content")
        if isinstance(row.get("completion"), list):
            turns += _turns(row, "completion", "role", "content")
        else:
            turns.append(_Turn("assistant", _text(row, "completion")))
        return _conversation(turns, _system(row), gold)
    # The chat template writes the roles, so a "User: ... Assistant:" frame would be said twice.
    user = _text(row, "prompt").removeprefix("User:").removesuffix("Assistant:").strip()
    if not user:
        raise Reject("empty prompt")
    think, answer = split_thought(_text(row, "completion"))
    return Example(user, answer, think, _system(row), gold)


# --- data sets -------------------------------------------------------------------------------------------------------


def _openr1(row: Row, keep_only_correct: bool) -> Example:
    """The first complete and correct generation; without ``keep_only_correct``, else the first complete one."""
    generations = row.get("generations")
    if not isinstance(generations, list) or not generations:
        raise Reject("no generations")
    count = len(generations)
    complete = [flag is not False for flag in _flags(row, "is_reasoning_complete", count)]
    reasons = row.get("finish_reasons")
    if isinstance(reasons, list) and len(reasons) == count:
        complete = [flag and reason != "length" for flag, reason in zip(complete, reasons)]
    verdicts = zip(_flags(row, "correctness_math_verify", count), _flags(row, "correctness_llama", count))
    correct = [bool(a or b) for a, b in verdicts]
    usable = [i for i in range(count) if complete[i] and isinstance(generations[i], str)]
    if not usable:
        raise Reject("no complete generation")
    right = [i for i in usable if correct[i]]
    if keep_only_correct and not right:
        raise Reject("no correct complete generation")
    think, answer = split_thought(generations[(right or usable)[0]])
    return Example(_text(row, "problem"), answer, think, _system(row), _gold(row, "answer"))


def _openthoughts_metadata(row: Row, _: bool) -> Example:
    gold = last_boxed(_optional(row, "ground_truth_solution") or "")
    think, answer = _text(row, "deepseek_reasoning"), _text(row, "deepseek_solution")
    return Example(_text(row, "problem"), answer, think, gold=gold)


def _s1(row: Row, _: bool) -> Example:
    if "deepseek_thinking_trajectory" in row:
        think, answer = _text(row, "deepseek_thinking_trajectory"), _text(row, "deepseek_attempt")
    else:
        trajectories = row.get("thinking_trajectories")
        if not isinstance(trajectories, list) or not trajectories or not isinstance(trajectories[0], str):
            raise Reject("no thinking_trajectories")
        think, answer = trajectories[0].strip(), _text(row, "attempt")
    return Example(_text(row, "question"), answer, think, gold=last_boxed(_optional(row, "solution") or ""))


def _dolphin_r1(row: Row, _: bool) -> Example:
    turns = [*_turns(row, "messages", "role", "content"), _Turn("assistant", _text(row, "answer"))]
    example = _conversation(turns, _system(row), None)
    return Example(example.user, example.answer, _text(row, "reasoning"), example.system, None, example.history)


def _r1_distill(row: Row, _: bool) -> Example:
    think, answer = split_thought(_text(row, "reannotated_assistant_content"))
    gold = last_boxed(_optional(row, "solution") or "")
    return Example(_text(row, "problem"), answer, think, _system(row), gold)


def _countdown(row: Row, _: bool) -> Example:
    """The gold is JSON, ``{"nums": [...], "target": n}``, because any correct equation is an answer."""
    nums, target = row.get("nums"), row.get("target")
    if not isinstance(nums, list) or not nums or not all(map(_is_number, [*nums, target])):
        raise Reject("nums or target is not a number")
    user = (
        f"Combine the numbers {', '.join(str(n) for n in nums)} into an expression that equals {target}. Use each "
        "number exactly once, with + - * / and parentheses only. Give the expression alone as the final answer."
    )
    return Example(user, gold=json.dumps({"nums": nums, "target": target}))


def _problem_answer(row: Row, _: bool) -> Example:
    solution = _optional(row, "generated_solution") or _optional(row, "solution")
    gold = _gold(row, "expected_answer", "answer") or last_boxed(solution or "")
    think, answer = split_thought(solution) if solution else (None, None)
    return Example(_text(row, "problem"), answer, think, _system(row), gold)


def _question_answer(row: Row, _: bool) -> Example:
    """GSM8K and plain question/answer rows: the gold is what follows ``####``, or all of a short answer.

    The prompt may be a conversation (TRL); the answer is its next turn.
    """
    column = "prompt" if _is_missing(row.get("question")) else "question"
    text = _gold(row, "answer", "gold")
    if text is None:
        raise Reject("no answer")
    think, answer = split_thought(text)
    final = answer.rpartition("####")[2].strip() if "####" in answer else last_boxed(answer) or answer
    gold = _gold(row, "gold") or final
    if isinstance(row.get(column), list):
        turns = _turns(row, column, "role", "content")
        return _conversation([*turns, _Turn("assistant", text)], _system(row), gold)
    return Example(_text(row, column), answer, think, _system(row), gold)


def _example(row: Row, _: bool) -> Example:
    think, answer = _optional(row, "think"), _optional(row, "answer")
    if answer is None or think is None:
        think, answer = (None, None) if answer is None else split_thought(answer)
    return Example(_text(row, "user"), answer, think, _optional(row, "system"), _gold(row, "gold"))


def _plain_text(row: Row, _: bool) -> Example:
    return Example(None, _text(row, "text"))


def _needs(parse: Callable[[Row, bool], Example], *columns: str) -> Schema:
    """A format that is known by ``columns``; ``a|b`` is one of two."""
    choices = [column.split("|") for column in columns]
    return Schema(lambda there: all(any(c in there for c in either) for either in choices), parse, ", ".join(columns))


# The first match wins, so formats with more specific columns come first.
SCHEMAS: dict[str, Schema] = {
    "openr1": _needs(_openr1, "problem", "generations"),
    "openthoughts_metadata": _needs(_openthoughts_metadata, "problem", "deepseek_reasoning", "deepseek_solution"),
    "s1": _needs(_s1, "question", "deepseek_thinking_trajectory|thinking_trajectories", "deepseek_attempt|attempt"),
    "dolphin_r1": _needs(_dolphin_r1, "messages", "reasoning", "answer"),
    "r1_distill": _needs(_r1_distill, "problem", "reannotated_assistant_content"),
    "messages": _needs(_messages, "messages"),
    "conversations": _needs(_conversations, "conversations"),
    "prompt_completion": _needs(_prompt_completion, "prompt", "completion"),
    "countdown": _needs(_countdown, "nums", "target"),
    "problem_answer": _needs(_problem_answer, "problem", "expected_answer|answer|solution"),
    "example": _needs(_example, "user", "answer|gold"),
    "question_answer": _needs(_question_answer, "question|prompt", "answer|gold"),
    "text": _needs(_plain_text, "text"),
}

# What mends a reason that concerns the whole file, for the message that no row is of use.
HINTS: dict[str, str] = {
    _UNKNOWN_FORMAT: "rename the columns or set data.schema; known formats: "
    + "; ".join(f"{name}: {schema.columns}" for name, schema in SCHEMAS.items()),
    _NO_CORRECTNESS: f"data.keep_only_correct needs one of the columns {', '.join(_CORRECTNESS)}: set "
    "data.keep_only_correct=false or add the column",
}
