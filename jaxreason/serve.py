"""A model opened for decoding: what generate.py and evaluate.py do."""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxreason import config as cfg
from jaxreason.checkpoint import write_json
from jaxreason.data import chat as chats
from jaxreason.data.chat import Chat
from jaxreason.data.example import Example, Reject
from jaxreason.data.tokenizer import Tokenizer, load
from jaxreason.errors import UserError
from jaxreason.evaluate import table
from jaxreason.evaluate.ask import Model, Outcome
from jaxreason.evaluate.exam import Exam, Item, freely, open_exam, split_name
from jaxreason.evaluate.records import Answer, Records
from jaxreason.evaluate.run import Raters, Result, Way, query_of, take
from jaxreason.evaluate.strategies import Strategy
from jaxreason.evaluate.strategies import get as get_strategy
from jaxreason.model import ModelConfig
from jaxreason.sampler import EngineSampler, Job, sampling_of
from jaxreason.sharding import make_mesh
from jaxreason.terminal import console, show_table
from jaxreason.text import THINK_OPEN
from jaxreason.weights import WeightSource, locate


@dataclasses.dataclass
class Opened:
    """A model that can be asked, once its weights are loaded."""

    source: WeightSource
    config: ModelConfig
    sampler: EngineSampler
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from other models."""
        run_as = self.config.execution
        return {"weights": self.source.digest(), "compute_dtype": run_as.compute_dtype, "attention": run_as.attention}

    def load(self) -> "Opened":
        self.sampler.load(self.source.params(self.config, make_mesh(cfg.Mesh())), step=0)
        return self

    def model(self, options: cfg.Decode) -> Model:
        """How searches ask it."""
        return Model(self.sampler, self.tokenizer, self.chat(options), options.seed, options.slots)

    def chat(self, options: cfg.Decode) -> Chat:
        return chats.resolve(self.tokenizer, options.template, options.system_prompt)


def open_model(name: str, options: cfg.Decode) -> Opened:
    """A run, checkpoint, Hugging Face directory or hub id for decoding; reads no weights. Raises UserError."""
    source = locate(name)
    tokenizer = load(source.tokenizer)
    config = source.config(options.compute_dtype, options.compute_dtype).replace(attention=options.attention)
    stops = tuple(sorted({*config.arch.stop_ids, *tokenizer.stop_ids}))
    return Opened(source, config, EngineSampler(config, stops, make_mesh(cfg.Mesh())), tokenizer, stops)


def answer(name: str, message: str, options: cfg.Decode) -> None:
    """Prints the model's answer to one user message while it is being written."""
    opened = open_model(name, options).load()
    try:
        prompt = opened.tokenizer.encode(opened.chat(options).render_prompt(Example(message)))
    except chats.Refused:
        raise
    except Reject as reject:
        raise UserError(f"--prompt holds {reject.reason}; leave it out") from None
    _streamed(opened, prompt, options)


def _streamed(opened: Opened, prompt: Sequence[int], options: cfg.Decode, draw: int = 0) -> str:
    """One completion of ``prompt``, which is printed while it is drawn; ``draw``: its number, which decides the noise."""
    stops, written = opened.stop_ids, ""
    seen: list[int] = []

    def show(prompt_index: int, sample_index: int, tokens: Iterable[int]) -> None:
        nonlocal written
        seen.extend(int(t) for t in tokens if int(t) not in stops)
        text = opened.tokenizer.decode(seen)
        # A multi-byte character may still lack its last bytes.
        whole = text[: -len("\ufffd")] if text.endswith("\ufffd") else text
        sys.stdout.write(whole[len(written) :])
        sys.stdout.flush()
        written = whole

    opened.sampler.stream([prompt], Job(sampling_of(options), seed=options.seed, draw=draw, slots=1), show)
    print()
    return written


def converse(name: str, options: cfg.Decode) -> None:
    """A conversation: each message of standard input is answered with all earlier turns before it, until its end or ``/exit``.

    ``/reset`` forgets the turns. A message that the model cannot be asked, or that leaves no room for an answer, is said on
    standard error and is not kept.
    """
    opened = open_model(name, options).load()
    chat, history = opened.chat(options), tuple[tuple[str, str], ...]()
    typed = sys.stdin.isatty()
    _aside(f"{name}: /reset forgets the conversation, /exit or Ctrl-D ends it")
    for number in itertools.count():
        try:
            message = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                print()
            return
        if message == "/exit":
            return
        if message == "/reset":
            history = ()
            _aside("the conversation is forgotten")
        elif message.startswith("/"):
            _aside(f"{message.split()[0]} is no command; there are /reset and /exit")
        elif message:
            history += _turn(opened, chat, history, message, options, number)


def _turn(
    opened: Opened, chat: Chat, history: tuple[tuple[str, str], ...], message: str, options: cfg.Decode, number: int
) -> tuple[tuple[str, str], ...]:
    """The turns that a message adds to a conversation: itself and its answer, or none where it cannot be asked."""
    try:
        prompt = chat.render_prompt(Example(message, history=history))
        ids = opened.tokenizer.encode(prompt)
    except Reject as reject:
        _aside(f"not asked: {reject}")
        return ()
    positions, limit = opened.config.arch.max_positions, options.max_completion_tokens
    room = positions - limit
    if len(ids) > room:
        _aside(
            f"not asked: the conversation has {len(ids)} tokens, and max_completion_tokens={limit} of the model's {positions} "
            f"positions leave room for {max(room, 0)}; /reset forgets it"
        )
        return ()
    text = _streamed(opened, ids, options, number)
    # A template that opens the thought has written the beginning of the turn.
    begun = f"{THINK_OPEN}\n" if prompt.rstrip().endswith(THINK_OPEN) else ""
    return ("user", message), ("assistant", begun + text)


def _aside(text: str) -> None:
    """What is not the model's, apart from its answers."""
    print(f"({text})", file=sys.stderr, flush=True)


def search(name: str, message: str, word: str, options: cfg.Decode, out: Path | None) -> None:
    """Prints the answer that a strategy finds to one user message, and what it cost. ``out``: a JSON file of its tree."""
    strategy = get_strategy(word)
    model = open_model(name, options).load().model(options)
    way = Way(strategy, sampling_of(options), 1, workers=1, timeout_s=10.0)
    item = freely(message, strategy.protocol)
    with Raters(way) as raters:
        (outcome,) = model.run([strategy.search(query_of(item, model, way.sampling, 1, raters))], 0)
    print(outcome.finals[0].text)
    cost = f"{outcome.drawn} tokens drawn in {outcome.calls} prompts of {outcome.read} tokens together"
    print(f"({word}: {cost})", file=sys.stderr)
    if out is not None:
        write_json(out, _plain(item, outcome, word))


def _plain(item: Item, outcome: Outcome, word: str) -> dict[str, Any]:
    final = outcome.finals[0]
    cost = {"tokens": outcome.drawn, "prompt_tokens": outcome.read, "prompts": outcome.calls}
    return {"question": item.question, "strategy": word, "text": final.text, **cost, **final.details}


@dataclasses.dataclass(frozen=True)
class Contest:
    """Models and strategies on tasks, every one on every one."""

    models: Sequence[str]
    tasks: Sequence[str]
    strategies: Sequence[Strategy | None]  # None: one draw, as the task is asked
    samples: int
    options: cfg.Task
    out: Path | None  # a folder


def measure(contest: Contest) -> dict[str, dict[str, Result]]:
    """Results by task, then by contestant; the tables are printed, and written where the contest says. Raises UserError."""
    out = contest.out
    if out is not None and out.is_file():
        raise UserError(f"--out {out} is a file; give a folder, in which answers.jsonl and summary.json are written")
    records, found = Records(out, Answer), dict[str, dict[str, Result]]()
    for name in contest.models:
        opened = open_model(name, contest.options)
        pairs = [(word, strategy) for word in contest.tasks for strategy in contest.strategies]
        exams = [_open(word, strategy, opened, contest.options) for word, strategy in pairs]
        opened.load()
        for (word, strategy), exam in zip(pairs, exams):
            results = found.setdefault(word, {})
            label = _label(name if len(contest.models) > 1 else None, strategy) or name
            label = label if label not in results else f"{label} {len(results)}"
            results[label] = _one(exam, strategy, opened, records, contest)
        opened.sampler.release()
    for word, results in found.items():
        table.show(f"{split_name(word)[0]}: {contest.models[0] if len(contest.models) == 1 else 'several models'}", results)
    if out is not None:
        write_json(out / "summary.json", {word: table.plain(results) for word, results in found.items()})
        console.print(f"answers and summary: {out}", markup=False)
    return found


def _label(model: str | None, strategy: Strategy | None) -> str:
    return " ".join(filter(None, (model, strategy.word if strategy else None)))


def _open(word: str, strategy: Strategy | None, opened: Opened, options: cfg.Task) -> Exam:
    exam = open_exam(word, options, opened.chat(options), opened.tokenizer, strategy.protocol if strategy else None)
    if exam.dropped:
        show_table(f"{exam.name}: rows left out", list(exam.dropped.items()))
    return exam


def _one(exam: Exam, strategy: Strategy | None, opened: Opened, records: Records[Answer], contest: Contest) -> Result:
    options = contest.options
    way = Way(strategy or get_strategy("direct"), sampling_of(options), contest.samples, options.workers, options.timeout_s)
    return take(exam, opened.model(options), way, records, opened.identity)
