"""Whether training made the model better or worse at what the run measures: an interval, not two numbers."""

import math
from collections.abc import Mapping

from jaxreason.terminal import console

_KEY = "eval_accuracy"


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """``eval_change`` = accuracy after − before, with the ends of its 95 % interval; {} where one of them is not known.

    Newcombe's hybrid of the two Wilson intervals (1998, method 10): Δ − √((p₂ − l₂)² + (u₁ − p₁)²) and
    Δ + √((u₂ − p₂)² + (p₁ − l₁)²). It takes the problems of both for different ones; they are the same, so it is wide.
    """
    names = [_KEY, f"{_KEY}_low", f"{_KEY}_high"]
    if not all(name in record for record in (before, after) for name in names):
        return {}
    (p1, l1, u1), (p2, l2, u2) = ([record[name] for name in names] for record in (before, after))
    found = p2 - p1
    return {
        "eval_change": found,
        "eval_change_low": max(-1.0, found - math.hypot(p2 - l2, u1 - p1)),
        "eval_change_high": min(1.0, found + math.hypot(u2 - p2, p1 - l1)),
    }


def warn(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Says so where the whole interval of the change is below 0, as small models lose by long traces (arXiv 2506.07712)."""
    found = change(before, after)
    if not found or found["eval_change_high"] >= 0:
        return
    low, high = 100 * found["eval_change_low"], 100 * found["eval_change_high"]
    cut = [record.get("eval_truncated_fraction", math.nan) for record in (before, after)]
    console.print(
        f"WARNING: training made this model worse. Held-out accuracy fell from {before[_KEY]:.1%} to {after[_KEY]:.1%}, by "
        f"{-100 * found['eval_change']:.1f} points (95 % interval of the change: {low:.1f} to {high:.1f}); answers cut off: "
        f"{cut[0]:.1%} before, {cut[1]:.1%} after. Small models can lose what they had on a few thousand long traces: use "
        "shorter traces or far more of them, a lower learning rate, or mix in short answers.",
        style="bold red", markup=False,
    )  # fmt: skip
