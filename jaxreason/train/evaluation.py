"""Accuracy on held-out problems: decode, grade, and say how sure the number is."""

import math
from collections.abc import Sequence

import numpy as np

from jaxreason import config as cfg
from jaxreason import rewards
from jaxreason.data.chat import Chat
from jaxreason.data.prompts import Prompt, Prompts
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.model import LlamaConfig
from jaxreason.rewards import Reward
from jaxreason.rewards.sample import Sample
from jaxreason.rewards.worker import call
from jaxreason.rollout import Completion, Engine, Sampling
from jaxreason.train import correction
from jaxreason.train.setup import Setup


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
        row=prompt.row,
        tokens=tuple(int(token) for token in completion.tokens),
    )


def _right(grader: Reward, sample: Sample) -> float:
    """1, 0, or NaN where there is no telling. What a grader raises costs a problem, not the run."""
    ((kind, value, _),) = call(grader, [sample])
    return math.nan if kind != "reward" or value is None else float(value >= 1.0)


def evaluate(
    engine: Engine, params: dict, prompts: Sequence[Prompt], tokenizer: Tokenizer, grader: Reward, samples: int = 1,
    seed: int = 0,
) -> tuple[dict[str, float], list[dict]]:
    """Accuracy of ``samples`` completions a problem (greedy if the engine's temperature is 0); 1 of the grader is right.

    Returns the metrics ``accuracy`` (mean over problems of the mean over samples: avg@k), its 95 % interval
    ``accuracy_low`` and ``accuracy_high`` (Wilson for one sample, else normal over the problems' means), ``pass_at_k``
    where k > 1, ``accuracy_if_finished``, ``truncated_fraction``, ``completion_tokens`` (mean), ``problems``; and one
    record per completion. A problem with a completion that the grader cannot grade (an unreadable gold, an exception) is
    left out and counted in ``ungraded``.
    """
    limit = engine.sampling.max_completion_tokens
    completions = engine.generate(params, [p.ids for p in prompts], group_size=samples, seed=seed, step=0)
    graded = [sample_of(prompts[c.prompt_index], c, tokenizer, limit) for c in completions]
    right = np.array([_right(grader, s) for s in graded])
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
    mean = float(right_P_K.mean()) if count else 0.0
    if samples == 1:
        low, high = wilson(float(right_P_K.sum()), count)
    else:
        error = 1.96 * float(right_P_K.mean(axis=1).std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0
        low, high = max(0.0, mean - error), min(1.0, mean + error)
    metrics = {
        "accuracy": mean,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_if_finished": float(right_P_K[finished].mean()) if finished.any() else 0.0,
        "truncated_fraction": float(1.0 - finished.mean()) if count else 0.0,
        "completion_tokens": float(np.mean([len(c.tokens) for c in completions])),
        "problems": count,
        "ungraded": int((~readable).sum()),
    }
    if samples > 1:
        metrics["pass_at_k"] = float((right_P_K.max(axis=1) > 0).mean()) if count else 0.0
    return metrics, records


class GrpoEvaluator:
    """Greedy accuracy on held-out problems; avg@k where ``eval.samples`` asks for it; with a second layer, what it mends."""

    def __init__(self, config: cfg.GrpoConfig, setup: Setup, problems: Prompts, model: LlamaConfig, chat: Chat):
        self._problems, self._tokenizer, self._samples = problems.prompts, setup.tokenizer, config.eval.samples
        self._seed, self._grader, self._chat = config.run.seed, rewards.get(config.eval.grader), chat
        self._phrase = config.correction.phrases[0] if config.correction.samples else None

        def engine(temperature: float) -> Engine:
            sampling = Sampling(temperature=temperature, max_completion_tokens=config.eval.max_completion_tokens)
            return Engine(model, setup.tokenizer.stop_ids, sampling, slots=config.eval.slots)

        self._greedy = engine(0.0)
        self._sampled = engine(config.eval.temperature) if self._samples > 1 else None

    def __call__(self, weights: dict) -> dict[str, float]:
        metrics, records = evaluate(self._greedy, weights, self._problems, self._tokenizer, self._grader)
        found = {f"eval_{name}": value for name, value in metrics.items()}
        if self._phrase is not None:
            again = [
                correction.again(p, r["completion"], self._phrase, self._chat, self._tokenizer)
                for p, r in zip(self._problems, records)
            ]
            _, after = evaluate(self._greedy, weights, again, self._tokenizer, self._grader)
            right = [np.array([r["correct"] for r in turn]) for turn in (records, after)]
            found |= {f"eval_{name}": value for name, value in correction.changes(*right).items()}
        if self._sampled:
            metrics, _ = evaluate(
                self._sampled, weights, self._problems, self._tokenizer, self._grader, self._samples, self._seed
            )
            found |= {f"eval_avg_at_{self._samples}{name.removeprefix('accuracy')}": metrics[name]
                      for name in ("accuracy", "accuracy_low", "accuracy_high")}  # fmt: skip
        return found
