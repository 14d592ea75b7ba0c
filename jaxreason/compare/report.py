"""The report of a comparison: one HTML file, and beside it every table as CSV and every figure as SVG, PNG and PDF."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jaxreason.compare.headline import Headline, headline
from jaxreason.compare.measured import described, indices, offline_figures, offline_tables
from jaxreason.compare.options import of_run, options_table
from jaxreason.compare.read import common_config, read_offline, read_variants
from jaxreason.compare.tables import accuracy_table, end_table, seed_table
from jaxreason.origin import ORIGIN
from jaxreason.report import page, plots
from jaxreason.report.charts import short, standalone
from jaxreason.report.curves import curve, is_constant, main_metrics, metrics_of, window
from jaxreason.report.explain import title
from jaxreason.report.figures import Chart, Figure
from jaxreason.report.read import Variant
from jaxreason.report.tables import Table, csv_of

NAME = "report.html"
TABLES, FIGURES = "report.tables", "report.figures"
_SHOWN_CHARACTERS = 3000  # of a prompt or completion
_PROMPTS = 2


@dataclass(frozen=True)
class Written:
    """Where a report is, and what it says first."""

    path: Path
    headline: Headline
    tables: list[Table]
    files: list[str]  # in words, what else there is


def write_report(where: Path, runs: Sequence[Path], made: dict[str, Any] | None = None) -> Written:
    """Writes ``where``/report.html, report.tables/*.csv and report.figures/*, from the files of ``runs`` and of the offline
    measurement in ``where``, if any.

    ``made``: of :func:`jaxreason.origin.origin`, what writes the report. Raises UserError for a folder that is no run.
    """
    variants = read_variants(runs) if runs else []
    measured = read_offline(where)
    found = [make(variants) for make in (accuracy_table, seed_table, end_table)] if variants else []
    trained, offline = [table for table in found if table], offline_tables(measured) if measured else []
    options = _options(variants, measured)
    figures, constant = _curves(variants)
    shown = [v.label for v in variants] or (measured["losses"] if measured else [])
    colours = indices(measured, shown) if measured else []
    measured_figures = offline_figures(measured, colours) if measured else []
    tables = [*trained, *offline]
    where.mkdir(parents=True, exist_ok=True)
    files = write_files(where, [*tables, *options], [*figures, *measured_figures])
    main, said = main_metrics(variants) if variants else [], headline(variants, measured)
    text = page.render(
        (resources.files(__package__) / "report.html").read_text(),
        headline=said, shown=shown, variants=variants, trained=trained, offline=offline, options=options,
        measured=measured, legend=list(zip(colours, measured["losses"])) if measured else [],
        described=described(measured) if measured else "", measured_figures=measured_figures,
        main=[f for f in figures if f.metric in main], more=[f for f in figures if f.metric not in main],
        constant={title(k): short(value) for k, value in constant.items()},
        smooth=max((window(run.last_step) for v in variants for run in v.runs), default=1), samples=samples(variants),
        config=common_config(variants) if variants else None, origins=_origins(variants, measured, made), files=files,
    )  # fmt: skip
    path = where / NAME
    # A model can write half of a surrogate pair, which no file encoding takes.
    path.write_bytes(text.encode("utf-8", "replace"))
    return Written(path, said, tables, files)


def _curves(variants: Sequence[Variant]) -> tuple[list[Chart], dict[str, float]]:
    """Charts of what changes over steps, and the values of what does not."""
    curves = [found for metric in (metrics_of(variants) if variants else []) if (found := curve(metric, variants))]
    constant = {c.metric: value for c in curves if (value := is_constant(c)) is not None}
    return [c for c in curves if c.metric not in constant], constant


def _options(variants: Sequence[Variant], measured: dict | None) -> list[Table]:
    """Of the trained losses, or else of the measured ones."""
    if variants:
        return [options_table([v.label for v in variants], [of_run(v.runs[0].config) for v in variants])]
    return [options_table(measured["losses"], measured["options"])] if measured else []


def _origins(
    variants: Sequence[Variant], measured: dict | None, made: dict[str, Any] | None
) -> list[tuple[str, dict[str, Any]]]:
    """What the page says about where its numbers come from: (heading, origin), one for runs that were started alike."""
    runs = [run for v in variants for run in v.runs]
    alike: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run in runs:
        for origin in run.origins:
            key = json.dumps([origin.get(name) for name in ORIGIN], sort_keys=True)
            alike.setdefault(key, (origin, []))[1].append(run.path.name)
    found = [(f"Training of {', '.join(dict.fromkeys(names))}", origin) for origin, names in alike.values()]
    if measured and "origin" in measured:
        found.append(("Offline measurement", measured["origin"]))
    if made and made not in [origin for _, origin in found]:
        found.append(("This report", made))
    return found


def write_files(where: Path, tables: Sequence[Table], figures: Sequence[Figure]) -> list[str]:
    """report.tables/NAME.csv and report.figures/NAME.svg, with matplotlib also .png and .pdf. Returns what there is, in words."""
    for folder in (TABLES, FIGURES):
        (where / folder).mkdir(exist_ok=True)
    for table in tables:
        (where / TABLES / f"{table.name}.csv").write_text(csv_of(table), "utf-8", "replace")
    for figure in figures:
        (where / FIGURES / f"{figure.name}.svg").write_text(standalone(figure), "utf-8", "replace")
        if plots.available():
            plots.write(figure, where / FIGURES / figure.name)
    kinds = "SVG, PNG and PDF" if plots.available() else "SVG"
    said = [f"{TABLES}/: {len(tables)} tables as CSV, unrounded", f"{FIGURES}/: {len(figures)} figures as {kinds}"]
    return said if plots.available() else [*said, plots.MISSING]


def samples(variants: Sequence[Variant]) -> list[dict]:
    """For the first prompts of the last step that every loss's first seed saw: its best and its worst completion."""
    by_prompt: list[dict[str, list[dict]]] = []
    for variant in variants:
        found: dict[str, list[dict]] = {}
        for sample in variant.runs[0].samples:
            found.setdefault(sample["prompt"], []).append(sample)
        by_prompt.append(found)
    shared = [prompt for prompt in (by_prompt[0] if by_prompt else {}) if all(prompt in found for found in by_prompt)]
    return [
        {
            "prompt": _cut(prompt),
            "gold": str(by_prompt[0][prompt][0]["gold"]),
            "answers": [
                {"index": i, "label": variant.label, "seed": variant.runs[0].seed, "step": variant.runs[0].last_step,
                 "completions": _extremes(by_prompt[i][prompt])}
                for i, variant in enumerate(variants)
            ],
        }
        for prompt in shared[:_PROMPTS]
    ]  # fmt: skip


def _extremes(group: list[dict]) -> list[dict]:
    """The completion with the highest reward, and the one with the lowest where that is less."""
    ordered = sorted(group, key=lambda s: float("-inf") if s["reward"] is None else s["reward"])
    chosen = [ordered[-1]] if ordered[0]["reward"] == ordered[-1]["reward"] else [ordered[-1], ordered[0]]
    return [
        {"text": _cut(s["completion"]), "reward": short(s["reward"]), "tokens": s["tokens"], "truncated": s["truncated"]}
        for s in chosen
    ]


def _cut(text: str) -> str:
    left = len(text) - _SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:_SHOWN_CHARACTERS]} … ({left:,} more characters)"
