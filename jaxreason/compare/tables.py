"""The tables of a comparison: what was measured, with its intervals, marked only where its own data support it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxreason.report.charts import short
from jaxreason.report.curves import main_metrics
from jaxreason.report.explain import title
from jaxreason.report.read import Run, Variant
from jaxreason.report.stats import Estimate, Rate, accuracy, accuracy_difference, t_factor
from jaxreason.report.tables import Table

ONE_UPDATE = (
    "One update a rollout: every ratio is 1, nothing is clipped, and built-in losses differ in aggregation and advantage "
    "alone. To compare what they make of the ratio: train.updates_per_rollout=2 train.minibatches=2."
)
# What decides which problems are asked and which answers are right.
_EXAM = ("data.eval_source", "data.eval_split", "eval.problems", "eval.grader", "eval.max_completion_tokens")


# ---- held-out accuracy


@dataclass(frozen=True)
class Standing:
    """How a loss did on held-out problems; None: not known."""

    label: str
    seeds: int
    before: float | None
    after: Estimate | None
    gain: Estimate | None  # after minus before
    ahead: Estimate | None  # minus the first loss; None for itself
    obstacle: str = ""  # why nothing is subtracted


def standings(variants: Sequence[Variant]) -> list[Standing]:
    """One for each loss; none if no run was evaluated.

    Gains are read together, and so are differences from the first loss: the intervals of each hold jointly
    (:func:`jaxreason.report.stats.t_factor`).
    """
    after = [_rates(v, Run.last) for v in variants]
    if not any(after):
        return []
    before = [_rates(v, Run.first) for v in variants]
    claims = max(1, len(variants) - 1)
    found = []
    for i, variant in enumerate(variants):
        obstacle = _obstacle(variants[0], variant, after[0], after[i]) if i else ""
        ahead = None if obstacle or not i else accuracy_difference(after[i], after[0], claims)
        start = statistics.fmean(rate.value for rate in before[i].values()) if before[i] else None
        end = accuracy(list(after[i].values())) if after[i] else None
        gain = accuracy_difference(after[i], before[i], len(variants))
        found.append(Standing(variant.label, len(variant.runs), start, end, gain, ahead, obstacle))
    return found


def _rates(variant: Variant, at: Callable[[Run, str], float | None]) -> dict[int, Rate]:
    """By seed, the held-out accuracy at the first or the last evaluation, and on how many problems it was."""
    known = {run.seed: (at(run, "eval_accuracy"), at(run, "eval_problems")) for run in variant.runs}
    return {seed: Rate(value, problems) for seed, (value, problems) in known.items() if value is not None}


def _obstacle(first: Variant, other: Variant, base: dict[int, Rate], rates: dict[int, Rate]) -> str:
    """Why the accuracies of two losses are not subtracted: other problems, another number of them, or no seed in common."""
    a, b = (_exam(variant.runs[0].config) for variant in (first, other))
    if differing := [key for key in _EXAM if a[key] != b[key] and key != "eval.problems"]:
        return f"other problems: {differing[0]} is {b[differing[0]]}, not {a[differing[0]]}"
    shared = sorted(base.keys() & rates.keys())
    if not shared:
        return "no seed in common" if base and rates else "not evaluated"
    odd = next((seed for seed in shared if base[seed].trials != rates[seed].trials), None)
    if odd is not None and all(base[seed].trials != rates[seed].trials for seed in shared):
        return f"{_count(rates[odd].trials)} problems, not {_count(base[odd].trials)}"
    return ""


def _exam(config: dict[str, Any]) -> dict[str, Any]:
    data, settings = config["data"], config["eval"]
    sections = {"data": {**data, "eval_source": data.get("eval_source") or data["source"]}, "eval": settings}
    return {key: sections[key.partition(".")[0]].get(key.partition(".")[2]) for key in _EXAM}


def _count(trials: float | None) -> str:
    return "an unknown number of" if trials is None else f"{trials:.0f}"


def accuracy_table(variants: Sequence[Variant]) -> Table | None:
    """Held-out accuracy before and after training; None if no run was evaluated."""
    found = standings(variants)
    if not found:
        return None
    rows, records = [], []
    for i, s in enumerate(found):
        rows.append([
            s.label, str(s.seeds), _percent(s.before), _percent(s.after.mean if s.after else None),
            _interval(s.after, clip=True), difference(s.gain), (s.obstacle or difference(s.ahead)) if i else "",
        ])  # fmt: skip
        records.append(
            {"loss": s.label, "seeds": s.seeds, "before": s.before, **_record("after", s.after), **_record("gain", s.gain),
             **_record("minus_first", s.ahead), "not_subtracted": s.obstacle}
        )  # fmt: skip
    header = ["loss", "seeds", "before", "after", "95 % interval", "gain", f"minus {variants[0].label}"]
    return Table("accuracy", "Held-out accuracy, %", header, rows, _accuracy_notes(variants, found), records)


def _record(name: str, found: Estimate | None) -> dict[str, float | None]:
    low, high = (found.low, found.high) if found else (None, None)
    return {name: found.mean if found else None, f"{name}_low": low, f"{name}_high": high}


def _accuracy_notes(variants: Sequence[Variant], found: Sequence[Standing]) -> list[str]:
    count = min(len(v.runs) for v in variants)
    notes = [
        "Gain and difference pair the same seed, which saw the same prompts, and are of runs on equally many problems; ▲ and ▼ "
        "mark intervals without 0. An interval is for other seeds and other problems: Student's t over seeds and the binomial "
        "error over problems, their squares added.",
    ]
    if len(variants) > 2:
        notes.append(
            f"The {len(variants)} gains, and the {len(variants) - 1} differences, are read together: their intervals are widened "
            "until all of a column hold at once with 95 % (Bonferroni)."
        )
    if any(s.obstacle for s in found):
        notes.append("Accuracies on other problems, or on another number of them, are not subtracted.")
    if count == 1:
        notes.append("With one seed the spread between seeds is unknown: no interval, and no claim about which is better.")
    elif count < 5:
        notes.append(
            f"With {count} seeds an interval is ± {t_factor(count):.1f} standard errors: only large differences can show."
        )
    return notes


def seed_table(variants: Sequence[Variant]) -> Table | None:
    """Held-out accuracy of every run, with its interval over problems; None if no run was evaluated."""
    runs = [run for v in variants for run in v.runs]
    if all(run.last("eval_accuracy") is None for run in runs):
        return None
    seeds = sorted({run.seed for run in runs})
    rows = []
    for variant in variants:
        cells = {run.seed: _of_seed(run) for run in variant.runs}
        rows.append([variant.label, *(cells.get(seed, "–") for seed in seeds)])
    problems = {count for run in runs if (count := run.last("eval_problems")) is not None}
    on = f" on {problems.pop():.0f} problems" if len(problems) == 1 else ""
    notes = [f"Greedy decoding{on}; in brackets the 95 % interval over problems (Wilson)."]
    if len(problems) > 1:
        counts = ", ".join(f"{n:.0f}" for n in sorted(problems))
        notes.append(f"The runs were not asked equally many problems: {counts}.")
    if any(run.summary is None for run in runs):
        notes.append("A run that is not finished counts with its latest evaluation; its step stands beside it.")
    names = ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_problems")
    records = [
        {"loss": v.label, "seed": run.seed, "step": run.last_step, **{name: run.last(name) for name in names}}
        for v in variants for run in v.runs
    ]  # fmt: skip
    return Table(
        "accuracy-by-seed", "Held-out accuracy by seed, %", ["loss", *(f"seed {seed}" for seed in seeds)], rows, notes, records
    )


def _of_seed(run: Run) -> str:
    value, low, high = (run.last(f"eval_accuracy{end}") for end in ("", "_low", "_high"))
    around = "" if low is None or high is None else f" ({_percent(low)}–{_percent(high)})"
    return f"{_percent(value)}{around}{'' if run.summary else f' at step {run.last_step}'}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(found: Estimate | None, clip: bool = False) -> str:
    if found is None or found.low is None or found.high is None:
        return "–"
    low, high = (max(0.0, found.low), min(1.0, found.high)) if clip else (found.low, found.high)
    return f"{100 * low:.1f} to {100 * high:.1f}"


def difference(found: Estimate | None) -> str:
    """``+3.1 (+1.0 to +5.2) ▲``; no difference of two accuracies is beyond ±100."""
    if found is None:
        return "–"
    around = ""
    if found.low is not None and found.high is not None:
        around = f" ({100 * max(-1.0, found.low):+.1f} to {100 * min(1.0, found.high):+.1f})"
    mark = "" if not found.excludes_zero else " ▲" if found.mean > 0 else " ▼"
    return f"{100 * found.mean:+.1f}{around}{mark}"


# ---- the end of training


def end_table(variants: Sequence[Variant]) -> Table:
    """The last tenth of training: mean over its steps, then over seeds, with the seeds' range; and the time it took."""
    columns: dict[str, list[list[float]]] = {}
    for metric in main_metrics(variants):
        if metric != "eval_accuracy":  # it has tables of its own
            columns[title(metric)] = [
                [value for run in v.runs if (value := _late_mean(run, metric)) is not None] for v in variants
            ]
    columns = {name: of for name, of in columns.items() if any(of)}
    columns["Seconds a step"] = [[value for run in v.runs if (value := _seconds(run)) is not None] for v in variants]
    columns["Minutes in all"] = [[run.summary["train_seconds"] / 60 for run in v.runs if run.summary] for v in variants]
    rows = [[name, *map(_spread, of)] for name, of in columns.items()]
    records = [
        {"metric": name, "loss": v.label, "seeds": len(values), "mean": statistics.fmean(values), "lowest": min(values),
         "highest": max(values)}
        for name, of in columns.items() for v, values in zip(variants, of) if values
    ]  # fmt: skip
    notes = [
        "Mean over the last tenth of the steps, then over seeds; in brackets the lowest and highest seed.",
        "Seconds a step: the median, without the first step, which compiles, and without evaluations.",
    ]
    if {run.config["train"].get("updates_per_rollout") for v in variants for run in v.runs} == {1}:
        notes.append(ONE_UPDATE)
    return Table("end-of-training", "End of training", ["", *(v.label for v in variants)], rows, notes, records)


def _late_mean(run: Run, metric: str) -> float | None:
    series = run.series(metric)
    late = [v for step, v in series.items() if v is not None and step > 0.9 * run.last_step]
    return statistics.fmean(late) if late else None


def _seconds(run: Run) -> float | None:
    values = [v for v in run.series("seconds").values() if v is not None]
    return statistics.median(values[1:] or values) if values else None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = short(min(values)), short(max(values))
    around = f" ({low} to {high})" if low != high else ""
    return short(statistics.fmean(values)) + around
