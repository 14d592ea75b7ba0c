"""Problems ready to be asked and graded: a benchmark by name, or any source of prompts with golds."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from jaxreason import config as cfg
from jaxreason import rewards
from jaxreason.data.chat import Chat
from jaxreason.data.example import Example
from jaxreason.data.prompts import load_prompts
from jaxreason.data.sources import splits_itself
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import UserError
from jaxreason.evaluate.tasks import TASKS, Problem, Protocol, Task, ask
from jaxreason.evaluate.tasks.load import load, load_shots
from jaxreason.evaluate.tasks.parse import same_form
from jaxreason.plugins import nearest
from jaxreason.rewards import Reward
from jaxreason.rewards.answer import extract
from jaxreason.rewards.sample import Sample, final_span


@dataclasses.dataclass(frozen=True)
class Item:
    """One problem: what is said to the model, and how its turn is read and graded."""

    digest: str
    question: str
    gold: str
    example: Example
    answer: Callable[[Sample], str | None]
    graded: Callable[[Sample], Sample]  # a finished turn -> what the grader is given
    problem: Problem | None = None


@dataclasses.dataclass(frozen=True)
class Exam:
    """A task's problems with the reward that grades them."""

    name: str
    items: tuple[Item, ...]
    reward: Reward
    asked: str  # the protocol and the number of shown examples, for tables and settings
    dropped: dict[str, int]


def split_name(word: str) -> tuple[str, str | None]:
    """NAME or NAME=PATH: a benchmark, and a local copy of it. A source has none."""
    name, _, place = word.partition("=")
    return (name, place or None) if name in TASKS else (word, None)


def open_exam(word: str, options: cfg.Task, chat: Chat, tokenizer: Tokenizer, protocol: Protocol | None = None) -> Exam:
    """The exam that ``--task`` names. ``protocol``: what a strategy says. Raises UserError."""
    if protocol and options.protocol and protocol != options.protocol:
        raise UserError(f"--strategy {protocol} and protocol={options.protocol} contradict each other; leave one out")
    name, place = split_name(word)
    if name in TASKS:
        return _benchmark(TASKS[name], place, options, protocol or options.protocol or "cot")
    for key in ("protocol", "shots", "shots_from"):
        if getattr(options, key):
            raise UserError(f"{key}= belongs to a benchmark ({', '.join(TASKS)}); --task {word} is a source, asked as it is")
    return _source(word, options, chat, tokenizer, protocol)


def _benchmark(task: Task, place: str | None, options: cfg.Task, protocol: Protocol) -> Exam:
    found = load(task, place, options.split, options.first, options.problems)
    shots_from = options.shots_from or place
    if options.shots and options.shots_from is None and place is not None and Path(place).is_file():
        raise UserError(f"shots={options.shots}: {place} is one file of problems to solve; give rows to show: shots_from=FILE")
    shots = load_shots(task, shots_from, found.problems, options.shots)
    family = task.family
    reward = rewards.get(family.grader, **family.options) if options.grader is None else rewards.get(options.grader)

    def item(problem: Problem, shown: tuple[Problem, ...]) -> Item:
        def answer(sample: Sample) -> str | None:
            span = final_span(sample)
            return None if span is None else family.parse(span, problem)

        def graded(sample: Sample) -> Sample:
            return dataclasses.replace(sample, prompt="", completion=answer(sample) or "", gold=problem.gold)

        example = ask(family, problem, protocol, shown)
        whole = graded if options.grader is None else _itself
        return Item(problem.digest, problem.question, problem.gold, example, answer, whole, problem)

    items = tuple(item(problem, shown) for problem, shown in zip(found.problems, shots))
    return Exam(task.name, items, reward, f"{protocol}, {options.shots}-shot", found.dropped)


_THINK = "\n\nThink step by step, and give the final answer at the end."


def _source(name: str, options: cfg.Task, chat: Chat, tokenizer: Tokenizer, protocol: Protocol | None) -> Exam:
    data = cfg.Data(
        source=name, split=options.split or ("eval" if splits_itself(name) else "test"),
        max_rows=options.first + options.problems,
        system_prompt=options.system_prompt, template=options.template,
    )  # fmt: skip
    try:
        prompts = load_prompts(data, tokenizer, options.seed, chat=chat)
    except UserError as error:
        unknown = "/" not in name and ":" not in name and not Path(name).suffix
        raise UserError(f"{error}\nor a benchmark{nearest(name, TASKS)}: {', '.join(TASKS)}") from None if unknown else error
    gym = name.startswith("reasoning-gym:")
    reward = rewards.get(options.grader or ("reasoning_gym" if gym else "accuracy"))
    items = []
    for prompt in prompts.prompts[options.first :]:
        user = prompt.user + (_THINK if protocol == "cot" else "")
        digest = hashlib.sha256(f"{prompt.text}\n{prompt.gold}".encode()).hexdigest()[:16]
        example = dataclasses.replace(prompt.instead(user), gold=prompt.gold, row=prompt.row)
        items.append(Item(digest, prompt.user, prompt.gold, example, _last, _itself))
    if not items:
        raise UserError(f"--task {name}: first={options.first}, but it has {len(prompts)} usable problems")
    return Exam(name, tuple(items), reward, protocol or "as it is", prompts.dropped)


def freely(message: str, protocol: Protocol | None) -> Item:
    """A message without a known answer."""
    example = Example(message + (_THINK if protocol == "cot" else ""))
    return Item(hashlib.sha256(message.encode()).hexdigest()[:16], message, "", example, _last, _itself)


def _last(sample: Sample) -> str | None:
    found = extract(sample)
    return same_form(found[-1].strip()) or None if found else None


def _itself(sample: Sample) -> Sample:
    return sample
