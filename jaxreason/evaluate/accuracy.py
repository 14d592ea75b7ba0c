"""Accuracy on held-out problems: decode, grade, and say how sure the number is."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxreason import config as cfg
from jaxreason import rewards
from jaxreason.data.prompts import Prompt
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.evaluate import estimates
from jaxreason.rewards import Reward
from jaxreason.rewards.pool import RewardPool
from jaxreason.rewards.sample import Sample
from jaxreason.sampler import Completion, Job, Sampler
from jaxreason.terminal import NO_TOKENS_YET, Working, console

_SHOWN_ERRORS = 3


@dataclasses.dataclass(frozen=True)
class Grading:
    """What decides which answers are right, and in how many processes with what time limit for one answer."""

    grader: Reward
    workers: int
    timeout_s: float


def grading_of(settings: cfg.Grader) -> Grading:
    """What a config's section says. Raises UserError for a grader that there is not."""
    return Grading(rewards.get(settings.grader), settings.workers, settings.timeout_s)


def sample_of(prompt: Prompt, completion: Completion, tokenizer: Tokenizer, limit: int) -> Sample:
    """What a reward function is given: the completion's text, without its stop token."""
    return Sample(
        prompt=prompt.text,
        completion=tokenizer.decode(completion.tokens if completion.truncated else completion.tokens[:-1]),
        gold=prompt.gold,
        completion_tokens=len(completion.tokens),
        max_completion_tokens=limit,
        truncated=completion.truncated,
        row=prompt.row,
        tokens=tuple(int(token) for token in completion.tokens),
    )


def right_of(pool: RewardPool, samples: Sequence[Sample]) -> np.ndarray:
    """[n] of 1, 0, or NaN where there is no telling. An answer on which the grader fails or hangs costs itself, not the run."""
    graded = pool.grade(samples)
    for error in graded.errors[:_SHOWN_ERRORS]:
        console.print(f"evaluation: {error}", markup=False)
    rewards = graded.rewards[:, 0]
    return np.where(np.isnan(rewards), np.nan, rewards >= 1.0)


def evaluate(
    sampler: Sampler, prompts: Sequence[Prompt], tokenizer: Tokenizer, grading: Grading, job: Job
) -> tuple[dict[str, float], list[dict]]:
    """Accuracy of ``job.samples`` completions of each problem (greedy at temperature 0); a grade of 1 is right.

    ``sampler`` has its weights already.

    Returns the metrics ``accuracy`` (mean over problems of the mean over samples: avg@k), its 95 % interval
    ``accuracy_low`` and ``accuracy_high`` (:func:`jaxreason.evaluate.estimates.clustered`), ``pass_at_k`` where k > 1,
    ``accuracy_if_finished``, ``truncated_fraction``, ``completion_tokens`` (mean), ``problems``; and one record per
    completion. A problem with a completion that the grader cannot grade (an unreadable gold, an exception, the time limit) is
    left out and counted in ``ungraded``. The grader runs in worker processes that are killed at the limit.
    """
    limit, samples = job.sampling.max_completion_tokens, job.samples
    # The workers start here, so that they load the grader while the sampler decodes.
    pool = RewardPool([(grading.grader, 1.0)], grading.workers, grading.timeout_s, "count")
    with pool, Working("evaluation", len(prompts) * samples, NO_TOKENS_YET) as show:
        completions = sampler.generate([p.ids for p in prompts], job, lambda done, _, tokens: show(done, f"{tokens:,} tokens"))
        show(len(completions), "grading")
        graded = [sample_of(prompts[c.prompt_index], c, tokenizer, limit) for c in completions]
        right = right_of(pool, graded)
    records = [
        {"problem": prompts[c.prompt_index].text, "gold": s.gold, "completion": s.completion, "correct": bool(r == 1.0),
         "tokens": s.completion_tokens, "truncated": s.truncated}
        for c, s, r in zip(completions, graded, right)
    ]  # fmt: skip
    right_P_K = right.reshape(len(prompts), samples)
    readable = ~np.isnan(right_P_K).any(axis=1)
    right_P_K = right_P_K[readable]
    count = len(right_P_K)
    finished = np.array([not c.truncated for c in completions]).reshape(len(prompts), samples)[readable]
    accuracy = estimates.clustered(right_P_K)
    metrics = {
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "accuracy_if_finished": float(right_P_K[finished].mean()) if finished.any() else 0.0,
        "truncated_fraction": float(1.0 - finished.mean()) if count else 0.0,
        "completion_tokens": float(np.mean([len(c.tokens) for c in completions])),
        "problems": count,
        "ungraded": int((~readable).sum()),
    }
    if samples > 1:
        metrics["pass_at_k"] = float((right_P_K.max(axis=1) > 0).mean()) if count else 0.0
    return metrics, records
