"""The report of a run, or of two beside each other: one HTML file made of the files that the runs wrote."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from jaxreason import config as cfg
from jaxreason.data.directory import read_json
from jaxreason.errors import UserError
from jaxreason.report import page
from jaxreason.report.charts import short
from jaxreason.report.curves import curve, is_constant, main_metrics, metrics_of, window
from jaxreason.report.explain import title
from jaxreason.report.figures import Bars, Chart
from jaxreason.report.read import Run, Variant, number, read_run, read_samples
from jaxreason.report.tables import Table
from jaxreason.train import worse

NAME = "report.html"
_PROMPTS = 12  # of a step that are shown
_SHOWN_CHARACTERS = 4000  # of a prompt or completion
_BINS = 12  # of a histogram of lengths


class _Shade(NamedTuple):
    name: str
    degree: Callable[[float], float]
    limits: tuple[float, ...]  # a token is darker past each of them
    said: str


_SHADES: Mapping[str, _Shade] = MappingProxyType({  # by the key of samples.jsonl
    "logp": _Shade("log-prob", lambda value: -math.exp(value), (-0.9, -0.6, -0.3, -0.1), "probability below 90, 60, 30, 10 %"),
    "entropy": _Shade("entropy", lambda value: value, (0.1, 0.5, 1.0, 2.0), "above 0.1, 0.5, 1, 2 nats"),
    "gap": _Shade("sampler's gap", abs, (1e-3, 1e-2, 0.05, 0.2), "beyond ±0.001, 0.01, 0.05, 0.2 nats"),
})  # fmt: skip
_NODES = 500  # of a tree that are drawn
_TREES = 4  # of an evaluation that are drawn
_GRADES = MappingProxyType({True: "right", False: "wrong", None: "not graded"})


def write_run_report(run: Path, other: Path | None = None, out: Path | None = None, tree: Path | None = None) -> Path:
    """Writes ``out`` (``run``/report.html) from the files of ``run`` and, beside it, of ``other``. Returns its path.

    ``tree``: what ``generate.py --strategy tot_bfs --out`` wrote, or an evaluation's answers.jsonl, drawn in addition.

    Raises UserError for a folder that is no run, runs of different algorithms, and a file of theirs that is damaged.
    """
    runs = [read_run(path) for path in (run, other) if path is not None]
    if len({found.config["algorithm"] for found in runs}) > 1:
        raise UserError(f"{run} and {other} are of different algorithms, which have no metrics in common")
    names = [found.path.name for found in runs]
    variants = [
        Variant(name if len(set(names)) == len(names) else str(found.path), [found]) for name, found in zip(names, runs)
    ]
    curves = [_with_interval(found, variants) for metric in metrics_of(variants) if (found := curve(metric, variants))]
    constant = {c.metric: value for c in curves if (value := is_constant(c)) is not None}
    figures, main = [c for c in curves if c.metric not in constant], main_metrics(variants)
    text = page.render(
        (resources.files(__package__) / "run.html").read_text(),
        lead=[headline(v.runs[0], v.label) for v in variants], variants=variants,
        main=[f for f in figures if f.metric in main], more=[f for f in figures if f.metric not in main],
        constant={title(k): short(value) for k, value in constant.items()},
        smooth=max(window(found.last_step) for found in runs), tables=_tables(variants),
        data=[(v.label, rows) for v in variants if (rows := _data(v.runs[0]))], steps=_steps(runs[0]),
        searches=[] if tree is None else searches(tree),
        lengths=[bars for i, v in enumerate(variants) if (bars := lengths(v, i))], differences=_differences(runs),
        config=yaml.safe_dump(runs[0].config, sort_keys=False, allow_unicode=True),
        origins=[(f"Start {i + 1} of {v.label}", one) for v in variants for i, one in enumerate(v.runs[0].origins)],
    )  # fmt: skip
    path = out or run / NAME
    try:
        # A model can write half of a surrogate pair, which no file encoding takes.
        path.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give --out FILE in a folder that is there") from None
    return path


# ---- what it learned


def headline(run: Run, label: str) -> str:
    """A sentence: held-out accuracy before and after, whether the change is more than its problems' error, and the time."""
    done = f"{label}: {run.last_step} steps" + ("" if run.summary else ", not finished")
    seconds = number((run.summary or {}).get("train_seconds"))
    done += f" in {seconds / 60:.1f} min" if seconds else ""
    return f"{done}. {learned(run)}"


def learned(run: Run, interval: str = "") -> str:
    """A sentence: what was measured before and after; ``interval``: the word before the ends of an accuracy's interval."""
    before, after = run.first("eval_accuracy"), run.last("eval_accuracy")
    if after is None:
        metric = "eval_loss" if run.last("eval_loss") is not None else "reward" if run.last("reward") is not None else "loss"
        known = [v for v in run.series(metric).values() if v is not None]
        moved = f"{title(metric)} {short(known[0])} → {short(known[-1])}. " if known else ""
        return f"{moved}No held-out problem was graded, so what it learned to answer is not known (eval.problems)."
    problems = run.last("eval_problems")
    on = f" on {problems:.0f} held-out problems" if problems else ""
    low, high = run.last("eval_accuracy_low"), run.last("eval_accuracy_high")
    around = f" ({interval}{100 * low:.1f}–{100 * high:.1f})" if low is not None and high is not None else ""
    if before is None:
        return f"Accuracy {100 * after:.1f} %{around}{on}; it was not measured before training."
    moved = f"Accuracy {100 * before:.1f} → {100 * after:.1f} %{around}{on}: {100 * (after - before):+.1f} points"
    measured = [record for record in run.records if number(record.get("eval_accuracy")) is not None]
    if not (change := worse.change(measured[0], measured[-1])):
        return f"{moved} (unknown how sure)."
    low, high = change["eval_change_low"], change["eval_change_high"]
    verdict = " Training made it worse." if high < 0 else "" if low > 0 else " These problems cannot tell that from no change."
    return f"{moved} ({100 * low:+.1f} to {100 * high:+.1f}).{verdict}"


def _with_interval(chart: Chart, variants: Sequence[Variant]) -> Chart:
    """The chart with the 95 % intervals that its runs recorded with its values, as ``METRIC_low`` and ``METRIC_high``."""
    lines = []
    for line in chart.lines:
        run = variants[line.index].runs[0]
        low, high = (run.series(f"{chart.metric}_{end}") for end in ("low", "high"))
        steps = [int(step) for step in line.steps]
        if set(steps) <= low.keys() & high.keys():
            line = dataclasses.replace(line, low=[low[step] for step in steps], high=[high[step] for step in steps])
        lines.append(line)
    return dataclasses.replace(chart, lines=lines)


# ---- tables


def _tables(variants: Sequence[Variant]) -> list[Table]:
    """Evaluations by step."""
    found = []
    for variant in variants:
        run = variant.runs[0]
        rows = [r for r in run.records if any(key.startswith("eval_") for key in r)]
        names = list(dict.fromkeys(key for r in rows for key in r if key.startswith("eval_")))
        if rows:
            cells = [[str(r["step"]), *(_cell(r.get(name)) for name in names)] for r in rows]
            header = ["step", *(title(name) for name in names)]
            found.append(Table("evaluation", f"Evaluation of {variant.label}", header, cells))
    return found


def _cell(value: Any) -> str:
    """A count whole, and anything else in three digits."""
    return f"{value:,}" if isinstance(value, int) else short(number(value))


def _data(run: Run) -> list[tuple[str, str]]:
    """data_report.json as names and values: what became of the rows."""
    path = run.path / "data_report.json"
    return [(name.replace("_", " "), value) for name, value in _pairs(read_json(path))] if path.is_file() else []


def _pairs(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            found += _pairs(value, f"{name}, ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found += [pair for i, inner in enumerate(value, 1) for pair in _pairs(inner, f"{name} {i}, ")]
        else:
            found.append((name, _words(value)))
    return found


def _words(value: Any) -> str:
    """``p5 35, p50 88``; a dash for nothing."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "–"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return "–" if value is None else str(value)


def _differences(runs: Sequence[Run]) -> Table | None:
    """Config keys whose values differ between two runs."""
    if len(runs) < 2:
        return None
    changed = cfg.differences(runs[0].config, runs[1].config)
    rows = [[key, json.dumps(a), json.dumps(b)] for key, (a, b) in changed.items() if not key.startswith("resolved")]
    return Table("differences", "Config of the second run", ["key", *(run.path.name for run in runs)], rows)


# ---- a search


def searches(path: Path) -> list[dict[str, Any]]:
    """The tree of thoughts of generate.py's file, or the first few trees of an evaluation's answers.jsonl.

    Raises UserError for another file."""
    if path.suffix != ".jsonl":
        found = read_json(path)
        return [search(found, path, str(found.get("strategy")))]
    fix = "give what evaluate.py --strategy tot_bfs --out FOLDER wrote"
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # the last one may be cut short
        answers = [answer for answer in map(json.loads, lines) if "tree" in answer["details"]]
        about = [f"{_GRADES[a['correct']]}; right is {_cut(str(a['gold']))}" for a in answers[:_TREES]]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the answers of an evaluation ({error!r}); {fix}") from None
    if not answers:
        raise UserError(f"{path}: no answer has a tree; {fix}")
    drawn = [search(answer | {"tree": answer["details"]["tree"]}, path, said) for answer, said in zip(answers, about)]
    drawn[-1]["trees_left"] = len(answers) - len(drawn)
    return drawn


def search(found: dict[str, Any], path: Path, about: str) -> dict[str, Any]:
    """A tree as lines in the order of a walk through it, each with its depth and what it adds to its parent.

    Raises UserError for what is none."""
    try:
        nodes = {node["id"]: node for node in found["tree"]["nodes"]}
        below: dict[Any, list[dict]] = {}
        for node in nodes.values():
            below.setdefault(node["parent"], []).append(node)
        lines: list[dict[str, Any]] = []
        stack, seen = below[None][::-1], set()
        while stack and len(lines) < _NODES:
            node = stack.pop()
            if node["id"] in seen:
                raise ValueError("a node that is below itself")
            seen.add(node["id"])
            text, parent = str(node["text"]), node["parent"]
            added = text if parent is None else text.removeprefix(str(nodes[parent]["text"]))
            lines.append({
                "depth": min(int(node["depth"]), 12), "text": _cut(added.strip("\n")), "value": short(number(node["value"])),
                "fate": str(node["fate"]), "answer": node["id"] == found["tree"]["answer"],
            })  # fmt: skip
            stack += below.get(node["id"], [])[::-1]
        head = {"question": _cut(str(found["question"])), "about": about, "trees_left": 0, "tokens": int(found["tokens"])}
    except (KeyError, TypeError, ValueError) as error:
        fix = "give what generate.py --strategy tot_bfs --out FILE wrote"
        raise UserError(f"{path}: no tree of thoughts ({error!r}); {fix}") from None
    return head | {"lines": lines, "left": len(nodes) - len(lines)}


# ---- completions


def lengths(variant: Variant, index: int) -> Bars | None:
    """How many completions of the last step have how many tokens; ``index``: the run's colour. None without samples."""
    sizes = [s["tokens"] for s in variant.runs[0].samples]
    if not sizes:
        return None
    width = max(1, math.ceil((max(sizes) + 1 - min(sizes)) / _BINS))
    starts = range(min(sizes), max(sizes) + 1, width)
    counts = [float(sum(start <= size < start + width for size in sizes)) for start in starts]
    cut = sum(bool(s["truncated"]) for s in variant.runs[0].samples)
    note = f"Tokens of the {len(sizes)} completions of step {variant.runs[0].samples[0]['step']}; {cut} reached the limit."
    labels = [f"{start}" if width == 1 else f"{start}–{start + width - 1}" for start in starts]
    return Bars("lengths", f"Completion lengths of {variant.label}", note, [index] * len(labels), labels, counts, counts=True)


def _steps(run: Run) -> list[dict[str, Any]]:
    """The first and the last step's completions, by problem, the best first."""
    found: list[dict[str, Any]] = []
    for samples in (read_samples(run.path / "samples.jsonl", "first"), run.samples):
        if not samples or (found and found[-1]["step"] == samples[0]["step"]):
            continue
        problems: dict[tuple, list[dict]] = {}
        for sample in samples:
            problems.setdefault((sample["group"], sample["prompt"], str(sample["gold"])), []).append(sample)
        shown = [
            {"prompt": _cut(prompt), "gold": _cut(gold), "completions": _completions(group), "rewards": _rewards(group)}
            for (_, prompt, gold), group in list(problems.items())[:_PROMPTS]
        ]
        found.append({"step": samples[0]["step"], "problems": shown, "left": max(0, len(problems) - _PROMPTS),
                      "shades": {k: v for k, v in _SHADES.items() if any(s.get(k) for s in samples)}})  # fmt: skip
    return found


def _rewards(group: Sequence[dict]) -> str:
    """``rewards 0 0 1``."""
    return "rewards " + " ".join("–" if s["reward"] is None else f"{s['reward']:.3g}" for s in group)


def _completions(group: Sequence[dict]) -> list[dict[str, Any]]:
    ordered = sorted(group, key=lambda s: float("inf") if s["reward"] is None else -s["reward"])
    return [
        {"text": _cut(s["completion"]), "reward": short(s["reward"]), "advantage": short(number(s.get("advantage"))),
         "parts": {name: short(value) for name, value in s.get("rewards", {}).items()}, "tokens": s["tokens"],
         "truncated": s["truncated"], "pieces": _shaded(s)}
        for s in ordered
    ]  # fmt: skip


def _by_token(sample: dict, key: str) -> list[float | None]:
    """The numbers of a sample's tokens; [] of a sample that has none."""
    return [number(value) for value in sample.get(key) or []]


def _shaded(sample: dict) -> list[tuple[str, str, str]]:
    """(text, classes that shade it, numbers) of the tokens of a sample that was written token by token; [] of another.

    A class is the first letter of what it shades by and 1 to 4.
    """
    pieces = [str(piece) for piece in sample.get("pieces") or []]
    values = {key: found for key in _SHADES if (found := _by_token(sample, key))}
    if any(len(found) != len(pieces) for found in values.values()) or sum(map(len, pieces)) > 2 * _SHOWN_CHARACTERS:
        return []
    shown = []
    for i, piece in enumerate(pieces):
        known = {key: value for key, found in values.items() if (value := found[i]) is not None}
        degrees = {key: sum(_SHADES[key].degree(value) > limit for limit in _SHADES[key].limits) for key, value in known.items()}
        classes = " ".join(f"{key[0]}{degree}" for key, degree in degrees.items() if degree)
        shown.append((piece, classes, ", ".join(f"{_SHADES[key].name} {short(value)}" for key, value in known.items())))
    return shown


def _cut(text: str) -> str:
    left = len(text) - _SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:_SHOWN_CHARACTERS]} … ({left:,} more characters)"
