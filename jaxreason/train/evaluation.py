"""Accuracy on held-out problems: decode, grade, and say how sure the number is."""

import math
from collections.abc import Sequence

import numpy as np

from jaxreason.data.prompts import Prompt
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.rewards.answer import accuracy
from jaxreason.rewards.sample import Sample
from jaxreason.rollout import Completion, Engine


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927): honest at 0 %, at 100 % and for few trials."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def sample_of(prompt: Prompt, completion: Completion, tokenizer: Tokenizer, limit: int) -> Sample:
    """What a reward function is given: the completion's text, without its stop token."""
    return Sample(
        prompt=prompt.text,
        completion=tokenizer.decode(completion.tokens if completion.truncated else completion.tokens[:-1]),
        gold=prompt.gold,
        completion_tokens=len(completion.tokens),
        max_completion_tokens=limit,
        truncated=completion.truncated,
    )


def evaluate(
    engine: Engine, params: dict, prompts: Sequence[Prompt], tokenizer: Tokenizer, samples: int = 1, seed: int = 0
) -> tuple[dict[str, float], list[dict]]:
    """Exact-answer accuracy of ``samples`` completions a problem (greedy if the engine's temperature is 0).

    Returns the metrics ``accuracy`` (mean over problems of the mean over samples: avg@k), its 95 % interval
    ``accuracy_low`` and ``accuracy_high`` (Wilson for one sample, else normal over the problems' means), ``pass_at_k``
    where k > 1, ``accuracy_if_finished``, ``truncated_fraction``, ``completion_tokens`` (mean), ``problems``; and one
    record per completion. A problem whose gold no grader can read is left out and counted in ``unreadable_gold``.
    """
    limit = engine.sampling.max_completion_tokens
    completions = engine.generate(params, [p.ids for p in prompts], group_size=samples, seed=seed, step=0)
    graded = [sample_of(prompts[c.prompt_index], c, tokenizer, limit) for c in completions]
    rewards = np.array([math.nan if (r := accuracy(s)) is None else r for s in graded])
    records = [
        {"problem": prompts[c.prompt_index].text, "gold": s.gold, "completion": s.completion, "correct": bool(r == 1.0),
         "tokens": s.completion_tokens, "truncated": s.truncated}
        for c, s, r in zip(completions, graded, rewards)
    ]  # fmt: skip
    rewards_P_K = rewards.reshape(len(prompts), samples)
    readable = ~np.isnan(rewards_P_K).any(axis=1)
    rewards_P_K = rewards_P_K[readable]
    count = len(rewards_P_K)
    finished = np.array([not c.truncated for c in completions]).reshape(len(prompts), samples)[readable]
    mean = float(rewards_P_K.mean()) if count else 0.0
    if samples == 1:
        low, high = wilson(float(rewards_P_K.sum()), count)
    else:
        error = 1.96 * float(rewards_P_K.mean(axis=1).std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0
        low, high = max(0.0, mean - error), min(1.0, mean + error)
    metrics = {
        "accuracy": mean,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_if_finished": float(rewards_P_K[finished].mean()) if finished.any() else 0.0,
        "truncated_fraction": float(1.0 - finished.mean()) if count else 0.0,
        "completion_tokens": float(np.mean([len(c.tokens) for c in completions])),
        "problems": count,
        "unreadable_gold": int((~readable).sum()),
    }
    if samples > 1:
        metrics["pass_at_k"] = float((rewards_P_K.max(axis=1) > 0).mean()) if count else 0.0
    return metrics, records
