"""Self-Instruct (arXiv 2212.10560): from a few seed tasks a model makes new ones, which become rows for SFT.

New instructions are proposed in lists after some of the pool, which grows by what passes the filters; of each the model says
whether it is classification, and writes instances: inputs first, or labels first for classification. Every draw is kept in a file
under a digest of what was asked, so that the same command goes on where it stopped, and makes what it would have made.
"""

import collections
import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxreason import config as cfg
from jaxreason.checkpoint import write_json
from jaxreason.curate import tasks
from jaxreason.curate.overlap import Contamination, Novelty
from jaxreason.curate.rows import REPORT, evaluation_sets, maker, owned, write_rows
from jaxreason.curate.select import unreadable
from jaxreason.curate.tasks import Instance, Task
from jaxreason.data.chat import Chat
from jaxreason.data.example import Example, Reject
from jaxreason.errors import UserError
from jaxreason.evaluate.ask import Ask, Final, Model, Search, Turn
from jaxreason.evaluate.records import Record, Records, digest
from jaxreason.sampler import Sampling, sampling_of
from jaxreason.serve import Opened, open_model
from jaxreason.terminal import NO_TOKENS_YET, Working, console, show_table

FILE = "drafts.jsonl"
_VERDICT_TOKENS = 16  # of an answer that is yes or no


@dataclasses.dataclass(frozen=True)
class InstructJob:
    """What build_data.py --seeds is asked for."""

    model: str
    seeds: str  # a source of tasks
    out: Path  # a folder
    options: cfg.Instruct


@dataclasses.dataclass(frozen=True)
class Draft(Record):
    """One answer of the model: a list of new tasks, or the instances of one."""

    text: str
    truncated: bool
    tokens: int
    classification: bool | None  # what it said of the task before; None: nothing that can be read, or it was not asked


@dataclasses.dataclass(frozen=True)
class Made:
    """A new task, and where its instruction comes from."""

    task: Task
    proposal: int  # number of the list
    shown: tuple[str, ...]  # ids of the tasks that it was made after


@dataclasses.dataclass
class Counts:
    """What became of all that was proposed: ``proposed`` is the kept and the sum of ``dropped``."""

    proposed: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def plain(self, kept: int) -> dict[str, Any]:
        """JSON-able; reasons in the order of their numbers."""
        return {"proposed": self.proposed, "kept": kept, "dropped": dict(self.dropped.most_common())}


class Drafts:
    """Answers of a model, drawn only where the file does not have them; weights are loaded for the first that it lacks."""

    def __init__(self, records: Records[Draft], settings: str, load: Callable[[], Model]):
        self._records, self._settings, self._load = records, settings, load
        self._model: Model | None = None

    def of(self, asked: Sequence[tuple[str, Callable[[], Search]]], first: int, what: str) -> list[Draft]:
        """The answers of searches, by the digests of what they ask; ``first``: the number of the first, which decides its noise.

        Those of a call are drawn together, or none of them is.
        """
        if any(self._records.find(self._settings, problem, 1) is None for problem, _ in asked):
            self._model = self._model or self._load()
            with Working(what, len(asked), NO_TOKENS_YET) as show:
                outcomes = self._model.run(
                    [search() for _, search in asked], first, lambda done, _, tokens: show(done, f"{tokens:,} tokens")
                )
            drawn = []
            for (problem, _), outcome in zip(asked, outcomes):
                final = outcome.finals[0]
                told = final.details.get("classification")
                drawn.append(Draft(self._settings, problem, 0, final.text, final.truncated, outcome.drawn, told))
            self._records.add(drawn)
        return [draft for problem, _ in asked for draft in self._records.find(self._settings, problem, 1) or []]


def instruct(job: InstructJob) -> dict[str, Any]:
    """Makes tasks until there are enough or all proposals are drawn, and writes rows.jsonl and report.json, which is returned.

    Raises UserError where nothing is kept (the report is written all the same), where another process writes the folder, and
    for what cannot be read.
    """
    with owned(job.out):
        return _instruct(job)


def _instruct(job: InstructJob) -> dict[str, Any]:
    options = job.options
    opened = open_model(job.model, options)
    seen, chat = evaluation_sets(options, opened), opened.chat(options)
    seeds, left = tasks.read_seeds(job.seeds, options.split, options.max_rows, options.seed)
    settings = digest({**opened.identity, "sampling": dataclasses.asdict(sampling_of(options)), "seed": options.seed,
                       "instance_temperature": options.instance_temperature})  # fmt: skip
    drafts = Drafts(Records(job.out, Draft, FILE), settings, lambda: opened.load().model(options))
    made, proposals, of_tasks = propose(seeds, options, seen, chat, drafts)
    console.print(f"{job.seeds}: {len(seeds)} seed tasks, {len(made)} new ones in {proposals} lists", markup=False)
    rows, kinds, of_instances = _instances(made, seeds, options, seen, chat, drafts)
    opened.sampler.release()
    report = {
        "model": job.model, "seeds": job.seeds, "seed_tasks": len(seeds), "rows_dropped": left, "lists": proposals,
        "instructions": of_tasks.plain(len(made)), "kinds": dict(kinds), "instances": of_instances.plain(len(rows)),
        "options": options.model_dump(mode="json"),
    }  # fmt: skip
    write_json(job.out / REPORT, report)
    _show(report, job.out)
    if not rows:
        told = of_instances if made else of_tasks
        common = ", ".join(f"{reason}: {count}" for reason, count in told.dropped.most_common(3)) or "no list could be read"
        raise UserError(f"no instance was kept ({common}); see {job.out / REPORT}; a model that follows instructions is needed")
    shared = _origin(job, opened)
    write_rows(job.out, [row | shared for row in rows])
    return report


# ---- instructions


def propose(
    seeds: Sequence[Task], options: cfg.Instruct, seen: Contamination, chat: Chat, drafts: Drafts
) -> tuple[list[Made], int, Counts]:
    """New tasks, the lists that were drawn, and what became of the instructions in them."""
    made, counts, number = list[Made](), Counts(), 0
    novelty = Novelty(math.nextafter(options.rouge_below, 0.0))
    for seed in seeds:
        novelty.add(seed.instruction)
    most = options.proposals or options.instructions
    while len(made) < options.instructions and number < most:
        numbers = range(number, min(most, number + options.together))
        shown = [_shown(seeds, made, options, i) for i in numbers]
        drawn = drafts.of([_proposal(i, those, options, chat) for i, those in zip(numbers, shown)], number, "proposals")
        for i, those, draft in zip(numbers, shown, drawn):
            for instruction in _listed(draft, len(those), counts):
                reason = _unfit(instruction, options, seen, chat, novelty)
                if reason is None and len(made) == options.instructions:
                    reason = "more than were asked for"
                if reason is not None:
                    counts.dropped[reason] += 1
                    continue
                novelty.add(instruction)
                made.append(Made(Task(f"made_{len(made)}", instruction), i, tuple(task.id for task in those)))
        number = numbers.stop
    return made, number, counts


def _shown(seeds: Sequence[Task], made: Sequence[Made], options: cfg.Instruct, number: int) -> list[Task]:
    """The tasks that list ``number`` goes on from: a few of the model's own, the rest seeds, shuffled."""
    rng = random.Random(f"{options.seed} {number}")
    own = rng.sample(made, min(len(made), options.made_shown))
    wanted = options.seeds_shown + options.made_shown - len(own)
    chosen = [one.task for one in own] + rng.sample(seeds, min(len(seeds), wanted))
    rng.shuffle(chosen)
    return chosen


def _proposal(number: int, shown: Sequence[Task], options: cfg.Instruct, chat: Chat) -> tuple[str, Callable[[], Search]]:
    example, begun = tasks.asks_for_tasks(shown)

    def search() -> Search:
        replies = yield Ask((Turn(example, (begun,)),), sampling_of(options))
        return (Final(replies[0][0].text, replies[0][0].truncated),)

    return digest({"list": number, "prompt": _rendered(example, chat), "begun": begun}), search


def _listed(draft: Draft, shown: int, counts: Counts) -> list[str]:
    """The instructions of a list after ``shown`` others. All are counted; the last one of a list that was cut off is left out."""
    found, unfinished = tasks.numbered(f"{shown + 1}. {draft.text}", shown + 1, shown + tasks.MORE)
    counts.proposed += len(found)
    if draft.truncated and unfinished:
        counts.dropped["not finished within max_completion_tokens"] += 1
        found.pop()
    return found


def _unfit(instruction: str, options: cfg.Instruct, seen: Contamination, chat: Chat, novelty: Novelty) -> str | None:
    if reason := tasks.unfit(instruction, options.min_words, options.max_words, options.refused):
        return reason
    try:
        chat.render_prompt(Example(instruction))
    except Reject as reject:
        return f"SFT could not read it: {reject.reason}"
    if novelty.refuses(instruction):
        return f"ROUGE-L with an earlier instruction not below {options.rouge_below:g}"
    if seen.has(instruction):
        return f"shares {options.ngram} words in a row with an evaluation set"
    return None


# ---- instances


def _instances(
    made: Sequence[Made], seeds: Sequence[Task], options: cfg.Instruct, seen: Contamination, chat: Chat, drafts: Drafts
) -> tuple[list[dict[str, Any]], collections.Counter[str], Counts]:
    """Rows without the columns that all share, how many tasks are of which kind, and what became of the instances."""
    rows, kinds, counts = list[dict[str, Any]](), collections.Counter[str](), Counts()
    shots = Shots.of(seeds, options)
    block = 2 * options.slots
    for first in range(0, len(made), block):
        part = made[first : first + block]
        drawn = drafts.of([_instance(one.task, shots, options, chat) for one in part], first, "instances")
        for one, draft in zip(part, drawn):
            kinds[{True: "classification", False: "other", None: "not told, taken as other"}[draft.classification]] += 1
            for number, pair in enumerate(_kept(one.task, draft, options, seen, chat, counts)):
                rows.append(_row(one, pair, bool(draft.classification), number))
    return rows, kinds, counts


@dataclasses.dataclass(frozen=True)
class Shots:
    """Seed tasks that are shown first: of known kinds, and with instances of either kind."""

    kinds: tuple[Task, ...]
    labelled: tuple[Task, ...]
    others: tuple[Task, ...]

    @classmethod
    def of(cls, seeds: Sequence[Task], options: cfg.Instruct) -> "Shots":
        """Chosen by the seed, the same for every task: their part of the prompt is then read once."""
        order = random.Random(f"{options.seed} shots").sample(list(seeds), len(seeds))
        known = [[task for task in order if task.classification is kind][: options.shots] for kind in (True, False)]
        told = sorted([*known[0], *known[1]], key=order.index)
        given = [task for task in order if task.instances]
        labelled = [task for task in given if task.classification][: options.shots]
        return cls(tuple(told), tuple(labelled), tuple([t for t in given if not t.classification][: options.shots]))


def _instance(task: Task, shots: Shots, options: cfg.Instruct, chat: Chat) -> tuple[str, Callable[[], Search]]:
    asked = tasks.asks_for_kind(task, shots.kinds)
    by_kind = {
        kind: tasks.asks_for_instances(task, kind, shots.labelled if kind else shots.others, options.instances)
        for kind in (False, True)
    }
    verdict = Sampling(min(_VERDICT_TOKENS, options.max_completion_tokens), temperature=0.0)
    way = Sampling(options.max_completion_tokens, temperature=options.instance_temperature)

    def search() -> Search:
        replies = yield Ask((Turn(asked),), verdict)
        told = tasks.kind(replies[0][0].text)
        replies = yield Ask((Turn(by_kind[bool(told)]),), way)
        return (Final(replies[0][0].text, replies[0][0].truncated, details={"classification": told}),)

    return digest({"prompts": [_rendered(example, chat) for example in (asked, *by_kind.values())]}), search


def _kept(
    task: Task, draft: Draft, options: cfg.Instruct, seen: Contamination, chat: Chat, counts: Counts
) -> list[Instance]:
    """The usable instances of a draft, all of which are counted."""
    found = tasks.instances(draft.text, bool(draft.classification))
    counts.proposed += len(found)
    if draft.truncated and found:
        counts.dropped["not finished within max_completion_tokens"] += 1
        found.pop()
    usable, dropped = tasks.sound(found)
    counts.dropped.update(dropped)
    kept = list[Instance]()
    for pair in usable:
        messages = _messages(task, pair)
        if reason := unreadable(messages, chat):
            reason = f"SFT could not read it: {reason}"
        elif seen.has(messages[0]["content"], pair.output):
            reason = f"shares {options.ngram} words in a row with an evaluation set"
        elif len(kept) == options.instances:
            reason = f"more than {options.instances} of an instruction"
        if reason:
            counts.dropped[reason] += 1
        else:
            kept.append(pair)
    return kept


def _messages(task: Task, pair: Instance) -> list[dict[str, str]]:
    user = f"{task.instruction}\n\n{pair.input}" if pair.input else task.instruction
    return [{"role": "user", "content": user}, {"role": "assistant", "content": pair.output}]


# ---- what is written


def _row(one: Made, pair: Instance, classification: bool, number: int) -> dict[str, Any]:
    return {
        "messages": _messages(one.task, pair), "instruction": one.task.instruction, **dataclasses.asdict(pair),
        "classification": classification, "id": one.task.id, "instance": number, "list": one.proposal, "shown": list(one.shown),
    }  # fmt: skip


def _origin(job: InstructJob, opened: Opened) -> dict[str, Any]:
    options = job.options
    return maker(opened) | {"seeds": job.seeds, "seed": options.seed, "temperature": options.temperature, "top_p": options.top_p}


def _rendered(example: Example, chat: Chat) -> str:
    try:
        return chat.render_prompt(example)
    except Reject as reject:
        raise UserError(f"a seed task holds {reject.reason}; leave it out") from None


def _show(report: dict[str, Any], out: Path) -> None:
    lines: list[tuple[str, object]] = [("seed tasks", report["seed_tasks"]), ("lists", report["lists"])]
    for what in ("instructions", "instances"):
        lines += [(f"{what} proposed", report[what]["proposed"]), (f"{what} kept", report[what]["kept"])]
        lines += [(f"{what} left out: {reason}", count) for reason, count in report[what]["dropped"].items()]
    lines += [(f"kind: {name}", count) for name, count in report["kinds"].items()]
    lines += [(f"seed rows left out: {reason}", count) for reason, count in report["rows_dropped"].items()]
    show_table(str(out), lines)
