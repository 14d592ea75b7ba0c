"""An exam taken by a model: asked in blocks, graded in killable processes, recorded, and summed up."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxreason import rewards
from jaxreason.errors import UserError
from jaxreason.evaluate import estimates
from jaxreason.evaluate.accuracy import right_of
from jaxreason.evaluate.ask import Model, Outcome, Query, sample_of_text
from jaxreason.evaluate.estimates import Interval
from jaxreason.evaluate.exam import Exam, Item
from jaxreason.evaluate.records import Answer, Records, digest
from jaxreason.evaluate.strategies import Strategy
from jaxreason.rewards.pool import RewardPool
from jaxreason.rewards.sample import Sample
from jaxreason.sampler import Sampling
from jaxreason.terminal import NO_TOKENS_YET, Working, console
from jaxreason.text import THINK_OPEN

_BLOCK = 16  # problems of a search that move in step; what is drawn depends on it
_BATCHES = 8  # slots' worth of single draws in a block: what is lost where a block ends is an eighth at most


@dataclasses.dataclass(frozen=True)
class Way:
    """How an exam is taken: all that decides what is drawn, apart from model and problems."""

    strategy: Strategy
    sampling: Sampling
    samples: int
    workers: int
    timeout_s: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Axes: P problems that were graded, K samples."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]  # of what the table shows with one
    right_P: dict[str, float]  # problem's digest -> mean over samples: what two results are paired by
    answers: list[Answer]


def take(exam: Exam, model: Model, way: Way, records: Records[Answer], identity: dict[str, Any]) -> Result:
    """Asks what ``records`` lacks, grades it, and sums up. ``identity``: what tells the model from others.

    Blocks are of consecutive problems and always the same ones, so a run that was cut off draws what it would have drawn.
    """
    if way.samples > 1 and not way.strategy.single:
        raise UserError(f"--samples {way.samples}: strategy {way.strategy.name} gives one answer a problem; leave --samples out")
    if way.samples > 1 and way.sampling.temperature == 0:
        raise UserError(f"--samples {way.samples} of greedy decoding are all the same; set e.g. temperature=0.6")
    settings = digest(identity | _settings(exam, model, way))
    block = max(1, _BATCHES * model.slots // way.samples) if way.strategy.single else _BLOCK
    total, done = len(exam.items) * way.samples, 0
    known = sum(records.find(settings, item.digest, way.samples) is not None for item in exam.items)
    what = f"{way.samples} answers each" if way.samples > 1 else way.strategy.name
    console.print(f"{exam.name} ({exam.asked}): {len(exam.items)} problems, {what}; {known} answered before", markup=False)
    pool = RewardPool([(exam.reward, 1.0)], way.workers, way.timeout_s, "count")
    with pool, Raters(way) as raters, Working(exam.name, total, NO_TOKENS_YET) as show:
        for first in range(0, len(exam.items), block):
            items = exam.items[first : first + block]
            have = [records.find(settings, item.digest, way.samples) for item in items]
            if not all(have):

                # A search asks again and again: how much of it is left is not known before its end.
                share = len(items) * way.samples if way.strategy.single else 0

                def drawn(finished: int, asked: int, tokens: int, done: int = done, share: int = share) -> None:
                    show(done + finished / asked * share, f"{tokens:,} tokens")

                outcomes = model.run([_search(item, model, way, raters) for item in items], first, drawn)
                records.add(_graded(items, outcomes, model, way, pool, settings))
            done += len(items) * way.samples
            show(done)
    found = [records.find(settings, item.digest, way.samples) or [] for item in exam.items]
    return summed_up(found)


class Raters:
    """Pools of the rewards by which a strategy chooses, made when they are first asked for."""

    def __init__(self, way: Way):
        self._way, self._pools = way, dict[str, RewardPool]()

    def __enter__(self) -> "Raters":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()

    def scores(self, name: str, samples: Sequence[Sample]) -> list[float]:
        """A reward of every sample; where it fails or has none, it is below every other."""
        if name not in self._pools:
            self._pools[name] = RewardPool([(rewards.get(name), 1.0)], self._way.workers, self._way.timeout_s, "count")
        found = self._pools[name].grade(samples).rewards[:, 0]
        return [float(value) for value in np.where(np.isnan(found), -np.inf, found)]


def query_of(item: Item, model: Model, sampling: Sampling, samples: int, raters: Raters) -> Query:
    """What a strategy is told of a problem."""
    prompt = model.chat.render_prompt(item.example)
    limit = sampling.max_completion_tokens

    def turn(text: str) -> Sample:
        return sample_of_text(prompt, text, None, None, limit, item.example.row)

    problem = item.problem
    return Query(
        item.example, sampling, samples, lambda text: item.answer(turn(text)), model.tokenizer.decode,
        lambda name, texts: raters.scores(name, [turn(text) for text in texts]), prompt.rstrip().endswith(THINK_OPEN),
        problem.numbers if problem else (), problem.target if problem else None, model.seed,
    )  # fmt: skip


def _search(item: Item, model: Model, way: Way, raters: Raters) -> Any:
    return way.strategy.search(query_of(item, model, way.sampling, way.samples, raters))


def _graded(
    items: Sequence[Item], outcomes: Sequence[Outcome], model: Model, way: Way, pool: RewardPool, settings: str
) -> list[Answer]:
    samples, owners = [], []
    for item, outcome in zip(items, outcomes):
        prompt = model.chat.render_prompt(item.example)
        for number, final in enumerate(outcome.finals):
            limit = way.sampling.max_completion_tokens
            samples.append(sample_of_text(prompt, final.text, final, item.gold, limit, item.example.row))
            owners.append((item, outcome, number, final))
    right = right_of(pool, [item.graded(sample) for sample, (item, *_) in zip(samples, owners)])
    answers = []
    for sample, value, (item, outcome, number, final) in zip(samples, right, owners):
        answers.append(Answer(
            settings, item.digest, number, item.answer(sample), None if np.isnan(value) else bool(value), final.truncated,
            outcome.drawn // len(outcome.finals) if len(outcome.finals) == 1 else len(final.tokens) + (not final.truncated),
            outcome.read, final.text, item.question, item.gold, final.details,
        ))  # fmt: skip
    return answers


def _settings(exam: Exam, model: Model, way: Way) -> dict[str, Any]:
    block = 0 if way.strategy.single else _BLOCK
    return {
        "task": exam.name, "asked": exam.asked, "first": [item.digest for item in exam.items[:1]],
        "prompt": model.chat.render_prompt(exam.items[0].example), "strategy": way.strategy.name, "options": way.strategy.options,
        "sampling": dataclasses.asdict(way.sampling), "seed": model.seed, "block": block,
        "grader": [exam.reward.target, dict(exam.reward.options)],
    }  # fmt: skip


def summed_up(found_P: Sequence[Sequence[Answer]]) -> Result:
    """Metrics of the problems whose answers were all graded; the others are counted in ``ungraded``.

    ``accuracy`` (pass@1 as the mean of K, which is avg@K), ``accuracy_if_finished``, ``truncated_fraction``, ``format_fraction``
    (an answer was found where it was asked for), ``tokens`` an answer, ``prompt_tokens``; for K > 1 ``pass@k`` of powers of
    two and of K, and ``cons@K``.
    """
    graded = [answers for answers in found_P if answers and all(answer.correct is not None for answer in answers)]
    every = [answer for answers in found_P for answer in answers]
    samples = len(found_P[0]) if found_P else 0
    right_P_K = np.array([[float(bool(a.correct)) for a in answers] for answers in graded]).reshape(len(graded), samples)
    intervals = {"accuracy": estimates.clustered(right_P_K)}
    finished = [float(bool(a.correct)) for answers in graded for a in answers if not a.truncated]
    if samples > 1 and graded:
        ks = sorted({2**i for i in range(1, samples.bit_length()) if 2**i <= samples} | {samples})
        intervals |= {f"pass@{k}": estimates.pass_at_k(right_P_K, k) for k in ks}
        votes = [[a.answer for a in answers] for answers in graded]
        intervals[f"cons@{samples}"] = estimates.consensus(votes, right_P_K)
    metrics: dict[str, float] = {}
    for name, interval in intervals.items():
        metrics |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    metrics |= {
        "accuracy_if_finished": float(np.mean(finished)) if finished else float("nan"),
        "truncated_fraction": _mean([a.truncated for a in every]),
        "format_fraction": _mean([a.answer is not None and not a.truncated for a in every]),
        "tokens": _mean([a.tokens for a in every]),
        "prompt_tokens": _mean([a.read for a in every]),
        "problems": len(graded),
        "ungraded": len(found_P) - len(graded),
    }
    means = {answers[0].problem: float(right.mean()) for answers, right in zip(graded, right_P_K)}
    return Result(metrics, intervals, means, every)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def difference(result: Result, base: Result) -> Interval:
    """Accuracy less the base's, paired over the problems that both were graded on."""
    shared = sorted(result.right_P.keys() & base.right_P.keys())
    ours, theirs = (np.array([found.right_P[key] for key in shared]) for found in (result, base))
    return estimates.paired(ours, theirs)
