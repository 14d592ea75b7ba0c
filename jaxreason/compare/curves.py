"""From the records of runs to the lines of charts."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jaxreason.compare.charts import Line
from jaxreason.compare.read import Variant
from jaxreason.compare.stats import trailing_mean

TITLES = {
    "reward": "Reward",
    "eval_accuracy": "Held-out accuracy",
    "completion_tokens": "Completion length, tokens",
    "entropy": "Entropy, nats a token",
    "kl": "KL to the reference, nats a token",
    "policy_kl": "KL from the sampling policy",
    "clip_fraction": "Clipped tokens, fraction",
    "grad_norm": "Gradient norm",
    "sampler_gap": "Sampler gap, nats a token",
    "loss": "Loss",
    "eval_loss": "Held-out loss, nats a token",
}
_MAIN = {
    # The value of a policy loss says nothing: its advantages have mean 0.
    "grpo": [name for name in TITLES if name not in ("loss", "eval_loss")],
    "sft": ["loss", "eval_loss", "eval_accuracy", "grad_norm"],
}

# What is the same for every loss by construction, or of no meaning over steps.
_DULL = {"step", "learning_rate", "problems", "eval_problems", "eval_tokens", "eval_ungraded", "no_reward_fraction"}
_POINTS = 240  # of a line: more cannot be seen and make the file large


@dataclass(frozen=True)
class Curve:
    metric: str
    title: str
    lines: list[Line]
    sparse: bool  # known at few steps, such as evaluations: not smoothed, every value marked


def window(steps: int) -> int:
    """How many steps the trailing mean of a run of ``steps`` steps takes: a twentieth."""
    return max(1, round(steps / 20))


def main_metrics(variants: Sequence[Variant]) -> list[str]:
    """What a comparison of these runs shows first."""
    return _MAIN[variants[0].runs[0].config["algorithm"]]


def metrics_of(variants: Sequence[Variant]) -> list[str]:
    """Names of numbers that any run recorded, the main ones first, the others in order of appearance."""
    seen = dict.fromkeys(
        key for v in variants for run in v.runs for record in run.records for key, value in record.items()
        if not isinstance(value, bool | None) and key not in _DULL
    )  # fmt: skip
    main = main_metrics(variants)
    return [*(m for m in main if m in seen), *(m for m in seen if m not in main)]


def curve(metric: str, variants: Sequence[Variant]) -> Curve | None:
    """The lines of one metric, over the steps that all seeds of a loss have; None if nobody has a finite value."""
    lines, sparse = [], metric.startswith("eval_")
    for index, variant in enumerate(variants):
        runs = [series for run in variant.runs if (series := run.series(metric))]
        if not runs:
            continue
        steps = sorted(set(runs[0]).intersection(*runs[1:]))
        columns = [[series[step] for step in steps] for series in runs]
        if not sparse:
            columns = [trailing_mean(column, window(len(steps))) for column in columns]
        # Counted from the end, so that the last step stays.
        keep = slice(None, None, -max(1, math.ceil(len(steps) / _POINTS)))
        rows = [[v for v in row if v is not None] for row in list(zip(*columns))[keep][::-1]]
        if any(rows):
            mean, low, high = ([f(row) if row else None for row in rows] for f in (statistics.fmean, min, max))
            lines.append(Line(index, variant.label, steps[keep][::-1], mean, low, high))
    return Curve(metric, TITLES.get(metric, metric), lines, sparse) if lines else None


def is_constant(found: Curve) -> float | None:
    """The one value that every run has at every step, or None."""
    values = {v for line in found.lines for side in (line.low, line.high) for v in side}
    return values.pop() if len(values) == 1 and None not in values else None
