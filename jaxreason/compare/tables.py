"""The tables of a comparison, as text: the terminal and the report show the same ones."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from jaxreason.compare.charts import short
from jaxreason.compare.curves import TITLES, main_metrics
from jaxreason.compare.read import Run, Variant
from jaxreason.compare.stats import Estimate, Rate, accuracy, accuracy_difference, t_factor

ONE_UPDATE = (
    "One update a rollout: every ratio is 1, nothing is clipped, and built-in losses differ in aggregation and advantage "
    "alone. To compare what they make of the ratio: train.updates_per_rollout=2 train.minibatches=2."
)


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def show(table: Table, console: Console) -> None:
    """Prints a table; no cell is read as markup."""
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in table.header:
        drawn.add_column(Text(name), overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    console.print(drawn)
    for note in table.notes:
        console.print(note, markup=False)


def accuracy_table(variants: Sequence[Variant]) -> Table | None:
    """Held-out accuracy before and after training; None if no run was evaluated."""
    after = [_rates(v, Run.last) for v in variants]
    if not any(after):
        return None
    before = [_rates(v, Run.first) for v in variants]
    rows = []
    for i, variant in enumerate(variants):
        found = accuracy(list(after[i].values())) if after[i] else None
        gain = accuracy_difference(after[i], before[i])
        ahead = accuracy_difference(after[i], after[0]) if i else None
        rows.append([
            variant.label, str(len(variant.runs)),
            _percent(statistics.fmean(rate.value for rate in before[i].values()) if before[i] else None),
            _percent(found.mean if found else None), _interval(found, clip=True), _difference(gain),
            _difference(ahead) if i else "",
        ])  # fmt: skip
    header = ["loss", "seeds", "before", "after", "95 % interval", "gain", f"minus {variants[0].label}"]
    return Table("Held-out accuracy, %", header, rows, _accuracy_notes(variants))


def _rates(variant: Variant, at: Callable[[Run, str], float | None]) -> dict[int, Rate]:
    """By seed, the held-out accuracy at the first or the last evaluation, and on how many problems it was."""
    known = {run.seed: (at(run, "eval_accuracy"), at(run, "eval_problems")) for run in variant.runs}
    return {seed: Rate(value, problems) for seed, (value, problems) in known.items() if value is not None}


def _accuracy_notes(variants: Sequence[Variant]) -> list[str]:
    count = min(len(v.runs) for v in variants)
    notes = [
        "Gain and difference pair the same seed, which saw the same prompts, and are of runs on equally many problems; ▲ and ▼ "
        "mark intervals without 0. An interval is for other seeds and other problems: Student's t over seeds and the binomial "
        "error over problems, their squares added.",
    ]
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
    problems = {run.last("eval_problems") for run in runs} - {None}
    on = f" on {problems.pop():.0f} problems" if len(problems) == 1 else ""
    notes = [f"Greedy decoding{on}; in brackets the 95 % interval over problems (Wilson)."]
    if any(run.summary is None for run in runs):
        notes.append("A run that is not finished counts with its latest evaluation; its step stands beside it.")
    return Table("Held-out accuracy by seed, %", ["loss", *(f"seed {seed}" for seed in seeds)], rows, notes)


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


def _difference(found: Estimate | None) -> str:
    """``+3.1 (+1.0 to +5.2) ▲``; no difference of two accuracies is beyond ±100."""
    if found is None:
        return "–"
    around = ""
    if found.low is not None and found.high is not None:
        around = f" ({100 * max(-1.0, found.low):+.1f} to {100 * min(1.0, found.high):+.1f})"
    mark = "" if not found.excludes_zero else " ▲" if found.mean > 0 else " ▼"
    return f"{100 * found.mean:+.1f}{around}{mark}"


def end_table(variants: Sequence[Variant]) -> Table:
    """The last tenth of training: mean over its steps, then over seeds, with the seeds' range; and the time it took."""
    rows = []
    for metric in main_metrics(variants):
        columns = [[value for run in v.runs if (value := _late_mean(run, metric)) is not None] for v in variants]
        if any(columns) and metric != "eval_accuracy":  # it has tables of its own
            rows.append([TITLES[metric], *map(_spread, columns)])
    seconds = [[value for run in v.runs if (value := _seconds(run)) is not None] for v in variants]
    minutes = [[run.summary["train_seconds"] / 60 for run in v.runs if run.summary] for v in variants]
    rows += [["Seconds a step", *map(_spread, seconds)], ["Minutes in all", *map(_spread, minutes)]]
    notes = [
        "Mean over the last tenth of the steps, then over seeds; in brackets the lowest and highest seed.",
        "Seconds a step: the median, without the first step, which compiles, and without evaluations.",
    ]
    if {run.config["train"].get("updates_per_rollout") for v in variants for run in v.runs} == {1}:
        notes.append(ONE_UPDATE)
    return Table("End of training", ["", *(v.label for v in variants)], rows, notes)


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


_POINTS = {"value": "value", "grad_norm": "gradient norm", "ratio_min": "lowest ratio", "ratio_max": "highest ratio",
           "clip_fraction": "clipped", "policy_kl": "KL to sampler", "kl": "KL to reference"}  # fmt: skip


def offline_tables(measured: dict) -> list[Table]:
    """Values, norms and cosines of a measurement, at both policies."""
    rollout, names = measured["rollout"], measured["losses"]
    places = {
        "start": "at the policy that sampled, every ratio 1",
        "stale": f"after one step of {names[0]} at learning rate {rollout['learning_rate']:g}",
    }
    tables = []
    for name, place in places.items():
        rows, cosines = measured["points"][name]["rows"], measured["points"][name]["cosine"]
        keys = [key for key in _POINTS if any(key in row for row in rows)]
        cells = [[label, *(short(row.get(key)) for key in keys)] for label, row in zip(names, rows)]
        tables.append(Table(f"Offline, {place}", ["loss", *(_POINTS[key] for key in keys)], cells))
        cells = [[label, *("–" if c is None else f"{c:.4f}" for c in row)] for label, row in zip(names, cosines)]
        tables.append(Table(f"Cosine between gradients, {place}", ["", *names], cells))
    tables[-1].notes.append(
        f"One rollout of {rollout['model']}: {rollout['prompts']} prompts x {rollout['group_size']} of {rollout['data']}, "
        f"seed {rollout['seed']}, {rollout['tokens']:,} tokens, mean reward {short(rollout['reward'])}, "
        f"{100 * rollout['zero_std_fraction']:.0f} % of the groups without a difference in reward."
    )
    if rollout["zero_std_fraction"] == 1:
        tables[-1].notes.append("No group differs in reward, so group-relative losses have no gradient here.")
    return tables
