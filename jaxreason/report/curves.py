"""From the records of runs to the lines of charts."""

import math
import re
import statistics
from collections.abc import Sequence

from jaxreason.report.explain import explain, title
from jaxreason.report.figures import Chart, Line
from jaxreason.report.read import Variant
from jaxreason.report.stats import trailing_mean

_MAIN = {
    # The value of a policy loss says nothing: its advantages have mean 0.
    "grpo": [
        "reward", "eval_accuracy", "completion_tokens", "entropy", "kl", "policy_kl", "clip_fraction", "grad_norm", "sampler_gap",
    ],
    "sft": ["loss", "eval_loss", "eval_accuracy", "grad_norm"],
}  # fmt: skip

# What is the same for every loss by construction, or of no meaning over steps.
_DULL = {"step", "learning_rate", "problems", "eval_problems", "eval_tokens", "eval_ungraded", "no_reward_fraction"}
_POINTS = 240  # of a line: more cannot be seen and make the file large


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


def curve(metric: str, variants: Sequence[Variant]) -> Chart | None:
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
    if not lines:
        return None
    name = "curve-" + re.sub(r"[^A-Za-z0-9_-]+", "-", metric)[:80]
    return Chart(name, title(metric), explain(metric), lines, marked=sparse, metric=metric)


def is_constant(found: Chart) -> float | None:
    """The one value that every run has at every step, or None."""
    values = {v for line in found.lines for side in (line.low, line.high) for v in side}
    return values.pop() if len(values) == 1 and None not in values else None
