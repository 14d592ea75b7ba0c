"""The report: one HTML file that needs no network and runs no script but its own."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from jaxreason.compare.charts import chart, short
from jaxreason.compare.curves import TITLES, curve, is_constant, main_metrics, metrics_of, window
from jaxreason.compare.read import Variant, common_config, read_offline, read_variants
from jaxreason.compare.tables import Table, accuracy_table, end_table, offline_tables, seed_table

NAME = "report.html"
_SHOWN_CHARACTERS = 3000  # of a prompt or completion
_PROMPTS = 2


def write_report(where: Path, runs: Sequence[Path]) -> tuple[Path, list[Table]]:
    """Writes ``where``/report.html from the files of ``runs`` and of the offline measurement in ``where``, if any.

    Returns its path and the tables in it. Raises UserError for a folder that is no run.
    """
    variants = read_variants(runs) if runs else []
    measured = read_offline(where)
    made = [make(variants) for make in (accuracy_table, seed_table, end_table)] if variants else []
    tables = [table for table in made if table]
    tables += offline_tables(measured) if measured else []
    where.mkdir(parents=True, exist_ok=True)
    path = where / NAME
    # A model can write half of a surrogate pair, which no file encoding takes.
    path.write_bytes(render(variants, tables).encode("utf-8", "replace"))
    return path, tables


def render(variants: Sequence[Variant], tables: Sequence[Table]) -> str:
    """The page. Everything that is not this package's own markup is escaped by the template engine."""
    style, script, page = ((resources.files(__package__) / f"report.{kind}").read_text() for kind in ("css", "js", "html"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    first = main_metrics(variants) if variants else []
    names = metrics_of(variants) if variants else []
    curves = [found for metric in names if (found := curve(metric, variants))]
    constant = {c.metric: value for c in curves if (value := is_constant(c)) is not None}
    figures = [
        {"title": c.title, "metric": c.metric, "main": c.metric in first, "svg": chart(c.title, c.lines, c.sparse)}
        for c in curves
        if c.metric not in constant
    ]
    lengths = {window(run.last_step) for v in variants for run in v.runs}
    return environment.from_string(page).render(
        style=Markup(style), script=Markup(script), policy=_policy(style, script), variants=variants, tables=tables,
        main=[f for f in figures if f["main"]], more=[f for f in figures if not f["main"]],
        constant={TITLES.get(k, k): short(value) for k, value in constant.items()},
        smooth=max(lengths, default=1), samples=samples(variants),
        config=common_config(variants) if variants else None,
    )  # fmt: skip


def _policy(style: str, script: str) -> str:
    """A content security policy that allows this style and this script, by hash, and nothing else."""

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; style-src {hashed(style)}; script-src {hashed(script)}; base-uri 'none'; form-action 'none'"


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
