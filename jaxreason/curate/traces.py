"""Traces of a model: drawn as evaluations draw, graded in killable processes, and kept in a file."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jaxreason import config as cfg
from jaxreason import rewards
from jaxreason.data.prompts import Prompt
from jaxreason.errors import UserError
from jaxreason.evaluate.ask import Ask, Final, Model, Outcome, Search, Turn, sample_of_text
from jaxreason.evaluate.records import Record, Records, digest
from jaxreason.rewards import Reward
from jaxreason.rewards.pool import RewardPool
from jaxreason.rewards.sample import Sample
from jaxreason.sampler import Sampling, sampling_of
from jaxreason.terminal import NO_TOKENS_YET, Working, console

FILE = "traces.jsonl"
_BATCHES = 8  # slots' worth of draws in a block: what is lost where a block ends is an eighth at most
_SHOWN_ERRORS = 3


@dataclasses.dataclass(frozen=True)
class Trace(Record):
    """One graded completion of a prompt."""

    number: int  # of the prompt among those that were asked: its noise is that of this number
    completion: str
    tokens: int  # the stop token included
    truncated: bool
    rewards: dict[str, float | None]  # by function; None: it had none, or failed
    reward: float | None  # their weighted sum; None: a function failed, or none had a reward


@dataclasses.dataclass(frozen=True)
class Way:
    """How traces are drawn and verified, apart from model and prompts."""

    sampling: Sampling
    samples: int
    functions: tuple[tuple[Reward, float], ...]  # with their weights
    reward: cfg.Reward


def way_of(options: cfg.Build, samples: int) -> Way:
    """What the overrides say. Raises UserError for samples that are all the same and for unknown rewards."""
    if samples > 1 and options.temperature == 0:
        raise UserError(f"--samples {samples} of greedy decoding are all the same; set e.g. temperature=1")
    functions = tuple((rewards.get(term.name, **term.options), term.weight) for term in options.reward.functions)
    return Way(sampling_of(options), samples, functions, options.reward)


def settings_of(way: Way, seed: int, identity: Mapping[str, object]) -> str:
    """A digest of all that decides a prompt's traces and their rewards. ``identity``: what tells the model from others.

    The number of samples is not part of it: the first of more samples are the same.
    """
    functions = [[reward.target, dict(reward.options), weight] for reward, weight in way.functions]
    return digest({**identity, "sampling": dataclasses.asdict(way.sampling), "seed": seed, "rewards": functions})


def problem_of(prompt: Prompt) -> str:
    """A digest of all that a model and a reward function read of a prompt."""
    row = None if prompt.row is None else json.dumps(prompt.row, default=repr, sort_keys=True)
    whole = json.dumps([prompt.text, prompt.gold, row])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def sample_of(prompt: Prompt, trace: Trace, limit: int) -> Sample:
    """A trace as a reward function reads it; ``limit``: max_completion_tokens."""
    return Sample(prompt.text, trace.completion, prompt.gold, trace.tokens, limit, trace.truncated, prompt.row)


def draw(found: Mapping[str, Prompt], model: Model, way: Way, records: Records[Trace], settings: str) -> None:
    """Draws and grades what ``records`` lacks of the prompts, which are given by their digests.

    Blocks are of consecutive prompts and always the same ones, and noise is a function of a prompt's place: a command that
    was cut off draws what it would have drawn.
    """
    problems = list(found)
    block, done = max(1, _BATCHES * model.slots // way.samples), 0
    pool = RewardPool(way.functions, way.reward.workers, way.reward.timeout_s, way.reward.on_error)
    with pool, Working("traces", len(problems) * way.samples, NO_TOKENS_YET) as show:
        for first in range(0, len(problems), block):
            part = problems[first : first + block]
            share = len(part) * way.samples
            if any(records.find(settings, problem, way.samples) is None for problem in part):

                def drawn(finished: int, asked: int, tokens: int, done: int = done, share: int = share) -> None:
                    show(done + finished / asked * share, f"{tokens:,} tokens")

                prompts = [found[problem] for problem in part]
                outcomes = model.run([_search(prompt, way) for prompt in prompts], first, drawn)
                records.add(_graded(prompts, outcomes, way, pool, settings, first))
            done += share
            show(done)


def _search(prompt: Prompt, way: Way) -> Search:
    replies = yield Ask((Turn(prompt.instead(prompt.user)),), way.sampling, way.samples)
    return tuple(Final(reply.text, reply.truncated, reply.tokens) for reply in replies[0])


def _graded(
    prompts: Sequence[Prompt], outcomes: Sequence[Outcome], way: Way, pool: RewardPool, settings: str, first: int
) -> list[Trace]:
    owners = [
        (place, number, final) for place, outcome in enumerate(outcomes) for number, final in enumerate(outcome.finals)
    ]
    samples, limit = [], way.sampling.max_completion_tokens
    for place, _, final in owners:
        prompt = prompts[place]
        samples.append(sample_of_text(prompt.text, final.text, final, prompt.gold, limit, prompt.row))
    graded = pool.grade(samples)
    for error in graded.errors[:_SHOWN_ERRORS]:
        console.print(f"traces: {error}", markup=False)
    traces = []
    for (place, number, final), row, total in zip(owners, graded.rewards, graded.total):
        parts = {name: None if np.isnan(value) else float(value) for name, value in zip(graded.names, row)}
        tokens = len(final.tokens) + (not final.truncated)
        problem = problem_of(prompts[place])
        traces.append(Trace(settings, problem, number, first + place, final.text, tokens, final.truncated, parts, total))
    return traces
