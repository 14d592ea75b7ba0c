"""The comparison: its statistics by hand, its page parsed, its runs entries, a real one end to end."""

import base64
import dataclasses
import hashlib
import html.parser
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import grpo_words
from test_grpo import batch_of, sequence

from jaxreason import cli, losses, model
from jaxreason import config as cfg
from jaxreason.compare import gradients, headline, measured, options, probe, read, report, runs, tables, work
from jaxreason.errors import UserError
from jaxreason.report import charts, curves, explain, plots, stats
from jaxreason.report.read import read_run
from jaxreason.report.stats import Rate
from jaxreason.train.step import make_gradient, make_score

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def _without_matplotlib(monkeypatch):
    """It takes seconds a report; tests/test_report.py draws with it."""
    monkeypatch.setattr(plots, "available", lambda: False)


# ---- statistics


def test_intervals_by_hand():
    # Quantiles of the printed t table: 12.706 for one degree of freedom, 4.303 for two.
    assert stats.t_factor(2) == pytest.approx(12.706, abs=1e-3)
    # One degree of freedom is Cauchy's distribution; for two claims the 0.9875 quantile.
    assert stats.t_factor(2, 2) == pytest.approx(math.tan(math.pi * 0.4875))
    found = stats.estimate([1.0, 2.0, 3.0])  # s = 1, s/sqrt(3) = 0.57735
    assert (found.mean, found.count) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.3027 * 0.57735, abs=1e-3) and not found.excludes_zero
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    alone = stats.estimate([0.7])
    assert (alone.mean, alone.low, alone.high, alone.excludes_zero) == (0.7, None, None, False)
    assert stats.estimate([1.0, 1.1, 0.9]).excludes_zero


def test_differences_pair_the_seeds():
    # Differences 0.1 and 0.1: no spread at all, though the accuracies themselves spread widely. What is left is the error
    # over 96 problems, p(1 − p)/100 with two right and two wrong answers more: 50/100, 40.4/100, 88.4/100 and 78.8/100.
    a, b = {0: 0.5, 1: 0.9, 7: 0.0}, {1: 0.8, 0: 0.4, 8: 1.0}
    found = stats.accuracy_difference({k: Rate(v, 96) for k, v in a.items()}, {k: Rate(v, 96) for k, v in b.items()})
    variance = (0.25 + 0.404 * 0.596 + 0.884 * 0.116 + 0.788 * 0.212) / 2 / 100
    assert found.mean == pytest.approx(0.1) and found.count == 2
    assert found.high - found.mean == pytest.approx(1.959964 * variance**0.5)
    # seeds apart by 0.2 add 12.706 · 0.1
    apart = stats.accuracy_difference({0: Rate(0.5, 96), 1: Rate(0.9, 96)}, {0: Rate(0.5, 96), 1: Rate(0.7, 96)})
    of_problems = (0.25 * 2 + 0.884 * 0.116 + 0.692 * 0.308) / 2 / 100
    assert apart.high - 0.1 == pytest.approx((12.7062**2 * 0.01 + 1.959964**2 * of_problems) ** 0.5, rel=1e-4)
    assert stats.accuracy_difference({0: Rate(1.0, 9)}, {1: Rate(1.0, 9)}) is None
    assert stats.accuracy_difference({0: Rate(1.0, 9)}, {0: Rate(1.0, 8)}) is None  # of another number of problems
    assert Rate(0.0, 0).variance == 0.25 / 4  # nothing was graded: as little is known as can be
    unknown = stats.accuracy_difference({s: Rate(0.9, None) for s in (0, 1)}, {s: Rate(0.1, None) for s in (0, 1)})
    assert (unknown.low, unknown.excludes_zero) == (None, False)


@pytest.mark.parametrize(("right", "mark"), [(120, ""), (121, ""), (160, " ▲"), (80, " ▼")])
def test_a_mark_needs_more_than_seeds_that_agree(tmp_path, right, mark):
    """200 problems, of which the first loss has 120 right with every seed: equal, one problem more, and 20 points apart."""
    paths = [
        make_run(tmp_path, f"{loss}-{seed}", seed, [{"step": 1, "eval_accuracy": n / 200, "eval_problems": 200}],
                 f"loss.name={loss}")
        for loss, n in (("grpo", 120), ("gspo", right)) for seed in range(3)
    ]  # fmt: skip
    variants = read.read_variants(paths)
    (_, row) = tables.accuracy_table(variants).rows
    assert row[6].startswith(f"{(right - 120) / 2:+.1f} (") and row[6].endswith(f"){mark}")
    said = headline.headline(variants, None)
    about = [s for s in said.supported if s.startswith("gspo ends ")]
    if mark:
        side = "above" if right > 120 else "below"
        assert len(about) == 1 and f"gspo ends {side} grpo" in said.lead
    else:
        assert not about and said.lead.startswith("No loss can be told from grpo")
        assert any(s.startswith("that gspo differs from grpo") for s in said.unsupported)


@pytest.mark.parametrize(("count", "marked"), [(2, True), (9, False)])
def test_marks_that_are_read_together_hold_together(tmp_path, count, marked):
    """12 points on 256 problems are 2.71 standard errors: beyond the 1.96 of one difference, not beyond the 2.73 of eight."""
    clip = [f"loss.options.clip_high={0.2 + i / 100}" for i in range(count)]
    paths = [
        make_run(tmp_path, f"{i}-{seed}", seed, [{"step": 1, "eval_accuracy": (160 if i == count - 1 else 130) / 256,
                                                  "eval_problems": 256}], clip[i])
        for i in range(count) for seed in range(2)
    ]  # fmt: skip
    rows = tables.accuracy_table(read.read_variants(paths)).rows
    assert [row[6].endswith("▲") for row in rows] == [False] * (count - 1) + [marked]


@pytest.mark.parametrize(
    ("words", "problems", "message"),
    [
        ((), 128, "128 problems, not 256"),
        ((), None, "an unknown number of problems, not 256"),
        (("data.source=embedded:x",), 256, "other problems: data.eval_source is embedded:x, not embedded:arithmetic"),
        (("eval.max_completion_tokens=64",), 256, "other problems: eval.max_completion_tokens is 64, not 128"),
    ],
)  # fmt: skip
def test_runs_on_other_problems_are_not_subtracted(tmp_path, words, problems, message):
    """Whatever the accuracies are, and even where they are far apart."""
    def lines(value, count):
        return [{"step": 1, "eval_accuracy": value, **({} if count is None else {"eval_problems": count})}]

    paths = [make_run(tmp_path, f"a{seed}", seed, lines(0.1, 256)) for seed in range(3)]
    paths += [make_run(tmp_path, f"b{seed}", seed, lines(0.9, problems), "loss.name=gspo", *words) for seed in range(3)]
    variants = read.read_variants(paths)
    table = tables.accuracy_table(variants)
    assert table.rows[1][6] == message and table.records[1]["minus_first"] is None
    assert any("are not subtracted" in note for note in table.notes)
    said = headline.headline(variants, None)
    assert any(s.endswith(message) for s in said.unsupported) and not any("gspo ends" in s for s in said.supported)


def test_no_interval_of_a_difference_leaves_what_accuracies_can_differ_by(tmp_path):
    """Two seeds that gain 0.9 and 0.7: 0.8 ± 12.706 · 0.1, which t alone would let reach 207 points."""
    gains = [(0, 0.0, 0.9), (1, 0.0, 0.7)]
    paths = [
        make_run(tmp_path, f"s{seed}", seed, [{"step": step, "eval_accuracy": value, "eval_problems": 10**9}
                                              for step, value in enumerate((a, b))])
        for seed, a, b in gains
    ]
    (row,) = tables.accuracy_table(read.read_variants(paths)).rows
    assert row[5] == "+80.0 (-47.1 to +100.0)"


def test_one_update_a_rollout_is_pointed_out(tmp_path):
    notes = []
    for name, word in (("once", "train.updates_per_rollout=1"), ("twice", "train.updates_per_rollout=2")):
        path = make_run(tmp_path, name, 0, [{"step": 1, "reward": 0.5}], word)
        notes.append(tables.end_table(read.read_variants([path])).notes)
    assert tables.ONE_UPDATE in notes[0] and tables.ONE_UPDATE not in notes[1]


def test_trailing_mean_leaves_gaps_out():
    assert stats.trailing_mean([1.0, 3.0, None, 5.0], 2) == [1.0, 2.0, None, 5.0]
    assert stats.trailing_mean([4.0, 2.0], 1) == [4.0, 2.0]


# ---- charts


def test_ticks_and_numbers():
    assert charts.ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert charts.ticks(0.83, 1.07) == [0.9, 1.0]
    assert charts.ticks(2.9e-7, 3.3e-7) == [2.9e-7, 3e-7, 3.1e-7, 3.2e-7, 3.3e-7]
    assert [charts.short(v) for v in (None, 0.0, 0.5, 12.345, 123.4, 4567.8, 3.14e-7)] == [
        "–", "0", "0.500", "12.3", "123", "4,568", "3.1e-07",
    ]  # fmt: skip


def make_run(where: Path, name: str, seed: int, lines: list[dict], *words: str, samples=(), finished=True) -> Path:
    """A run's files without the run."""
    path = where / name
    path.mkdir(parents=True)
    config = cfg.load("grpo", [f"run.name={name}", f"run.dir={where}", f"run.seed={seed}", *words])
    (path / "config.yaml").write_text(cfg.dump(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    if finished:
        (path / "summary.json").write_text(json.dumps({"step": lines[-1]["step"], "train_seconds": 120.0}))
    return path


def test_curves_are_mean_and_range_over_seeds_at_common_steps(tmp_path):
    a = make_run(tmp_path, "a", 0, [{"step": s, "reward": float(s)} for s in (1, 2, 3)])
    b = make_run(tmp_path, "b", 1, [{"step": 1, "reward": 3.0}, {"step": 2, "reward": "nan"}])
    (variant,) = read.read_variants([a, b])
    (line,) = curves.curve("reward", [variant]).lines
    # Step 3 belongs to one seed only; at step 2 the other seed's value is not finite.
    assert (line.steps, line.mean, line.low, line.high) == ([1, 2], [2.0, 2.0], [1.0, 2.0], [3.0, 2.0])
    assert curves.curve("entropy", [variant]) is None


def test_long_curves_are_smoothed_thinned_and_keep_their_end(tmp_path):
    lines = [{"step": s, "reward": s / 1000, "eval_accuracy": s / 1000} for s in range(1, 1001)]
    (variant,) = read.read_variants([make_run(tmp_path, "a", 0, lines)])
    (line,) = curves.curve("reward", [variant]).lines
    assert len(line.steps) <= 240 and line.steps[-1] == 1000
    assert line.mean[-1] == pytest.approx((951 + 1000) / 2 / 1000)  # the last twentieth: 50 steps
    assert curves.curve("eval_accuracy", [variant]).lines[0].mean[-1] == 1.0  # an evaluation stands for itself


# ---- files


def test_runs_group_and_are_named_by_what_differs(tmp_path):
    one = [{"step": 1, "reward": 0.0}]
    rate = "optimizer.learning_rate=0.0002"
    paths = [
        make_run(tmp_path, "a", 0, one, "loss.name=grpo", rate),
        make_run(tmp_path, "b", 3, one, "loss.name=my/file.py:mine", "loss.options.width=0.3", rate),
        make_run(tmp_path, "c", 1, one, "loss.name=grpo", "train.save_every=7", "mesh.fsdp=2", rate),  # not what is computed
        make_run(tmp_path, "d", 0, one, "loss.name=grpo", "optimizer.learning_rate=0.0001"),
    ]
    found = read.read_variants(paths)
    assert [v.label for v in found] == [f"grpo {rate}", f"mine width=0.3 {rate}", "grpo optimizer.learning_rate=0.0001"]
    assert [v.label for v in read.read_variants(paths[:2])] == ["grpo", "mine width=0.3"]
    assert [[r.seed for r in v.runs] for v in found] == [[0, 1], [3], [0]]


def resolved(path: Path, **found: str | None) -> Path:
    """The run's record of what it found at its start, filled in."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "resolved": {**config["resolved"], **found}}))
    return path


def test_seeds_of_a_source_that_writes_its_rows_are_one_loss(tmp_path):
    """Every seed has rows of its own, and the weights may have lain elsewhere: neither is another loss."""
    one = [{"step": 1, "reward": 0.0}]
    paths = [
        resolved(make_run(tmp_path, f"{loss}{seed}", seed, one, f"loss.name={loss}"),
                 data=f"rows{seed}", weights=f"/machine{seed}/a", weights_digest="w")
        for loss in ("grpo", "gspo") for seed in range(3)
    ]  # fmt: skip
    assert [(v.label, len(v.runs)) for v in read.read_variants(paths)] == [("grpo", 3), ("gspo", 3)]
    resolved(paths[5], weights_digest="other")
    assert [len(v.runs) for v in read.read_variants(paths)] == [3, 2, 1]
    resolved(paths[4], data="changed")
    with pytest.raises(UserError, match="grpo1 and .*gspo1 name the same data.source embedded:arithmetic and seed 1 but"):
        read.read_variants(paths)


def test_files_that_cannot_be_reported_are_named(tmp_path):
    good = make_run(tmp_path, "good", 0, [{"step": 1, "reward": 0.0}])
    with pytest.raises(UserError, match="same config and seed 0"):
        read.read_variants([good, make_run(tmp_path, "twin", 0, [{"step": 1}])])
    with pytest.raises(UserError, match="no config.yaml"):
        read.read_variants([tmp_path / "nothing"])
    with open(good / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')  # being written right now
    assert read_run(good).last_step == 1
    (good / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        read_run(good)
    sft = make_run(tmp_path, "sft", 0, [{"step": 1}])
    (sft / "config.yaml").write_text(cfg.dump(cfg.load("sft")))
    with pytest.raises(UserError, match="different algorithms"):
        read.read_variants([sft, make_run(tmp_path, "grpo", 0, [{"step": 1}])])


# ---- the page


class Page(html.parser.HTMLParser):
    """Cells of tables, contents of pre, and every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.rows, self.texts, self._open = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "line", "circle", "polyline", "polygon", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("pre", "script", "style"):
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag in self._open:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._open and self._open[-1] in self.texts:
            self.texts[self._open[-1]][-1] += data


@pytest.fixture
def two_losses(tmp_path):
    """grpo and gspo, two seeds each, with known accuracies and hostile text wherever text can come from."""
    paths = []
    for loss, ends in (("grpo", (0.6, 0.8)), ("gspo", (0.7, 0.9))):
        for seed, end in enumerate(ends):
            lines = [{"step": 0, "eval_accuracy": 0.5, "eval_problems": 100}]
            lines += [{"step": s, "reward": 0.4, "entropy": s / 10 + seed, "clip_fraction": 0.0, "seconds": 2.0,
                       f"mine {EVIL}": float(s)} for s in range(1, 10)]  # fmt: skip
            lines += [{"step": 10, "reward": 0.25 + 0.5 * seed, "entropy": 2.0, "clip_fraction": 0.0, "seconds": 4.0,
                       "eval_accuracy": end, "eval_accuracy_low": end - 0.1, "eval_accuracy_high": end + 0.1}]  # fmt: skip
            sample = {"step": 10, "group": 0, "prompt": f"2+2? {EVIL}", "gold": f"4{EVIL}", "tokens": 7, "truncated": False}
            samples = [sample | {"completion": f"{loss} {text} {EVIL} \ud800", "reward": reward}
                       for text, reward in (("middle", 0.5), ("best", 1.0), ("worst", 0.0))]  # fmt: skip
            older = [{**samples[0], "step": 9, "completion": "of an older step"}]
            paths.append(make_run(tmp_path, f"{loss}-{seed}", seed, lines, f"loss.name={loss}",
                                  f"data.system_prompt=\"{EVIL}\"", samples=older + samples))  # fmt: skip
    return tmp_path, paths


def test_the_report_holds_the_numbers(two_losses):
    where, paths = two_losses
    path = report.write_report(where, paths).path
    rows = {tuple(row) for row in Page(path.read_text()).rows}
    # Means 0.7 and 0.8; half-widths 12.706 · 0.1 leave [0, 1] on both sides, and [-1, 1] for gains: such intervals end
    # where accuracies do. Every pair differs by exactly 0.1, which on 100 problems is ± 1.96 · 0.0589: with two right and two
    # wrong answers more the shares are 62/104, 82/104, 72/104 and 92/104.
    assert ("grpo", "2", "50.0", "70.0", "0.0 to 100.0", "+20.0 (-100.0 to +100.0)", "") in rows
    (gspo,) = [row for row in rows if row[:4] == ("gspo", "2", "50.0", "80.0")]
    assert gspo[6] == "+10.0 (-1.6 to +21.6)"
    assert ("grpo", "60.0 (50.0–70.0)", "80.0 (70.0–90.0)") in rows
    assert ("Reward", "0.500 (0.250 to 0.750)", "0.500 (0.250 to 0.750)") in rows  # the last tenth is the last step
    assert ("Seconds a step", "2.00", "2.00") in rows and ("Minutes in all", "2.00", "2.00") in rows
    text = path.read_text()
    assert "12.7 standard errors" in text and "on 100 problems" in text
    assert "The same in every run at every step: Clipped tokens, fraction 0" in text


def test_no_text_of_a_run_becomes_markup(two_losses):
    where, paths = two_losses
    path = report.write_report(where, paths).path
    page = Page(path.read_text())
    names = {tag for tag, _ in page.tags}
    assert "img" not in names and [tag for tag, _ in page.tags].count("script") == 1
    shown = [text for text in page.texts["pre"] if text.startswith(("grpo ", "gspo "))]
    assert [text.split(" <")[0] for text in shown] == ["grpo best", "grpo worst", "gspo best", "gspo worst"]
    assert all(EVIL in text for text in shown)
    # Nothing is fetched, and only this page's own script and style may run, whatever else got in.
    for _, attributes in page.tags:
        assert not {"src", "href", "style", "onload", "onerror", "onclick"} & attributes.keys()
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[kind][0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_report_says_where_its_numbers_come_from(two_losses, monkeypatch):
    where, paths = two_losses
    made = {"command": f"python x {EVIL}", "commit": "abc with changes", "versions": {"jax": "9.9"}, "hardware": "1 x abacus",
            "time": "today"}  # fmt: skip
    first, later = ({**made, "command": command} for command in ("python scripts/compare.py --losses grpo", "again"))
    for run, started in zip(paths, ([first], [{**first, "time": "yesterday"}], [first, later])):
        (run / "origin.json").write_text(json.dumps(started))
    written = report.write_report(where, paths, made)
    rows = Page(written.path.read_text()).rows
    commands = ["python scripts/compare.py --losses grpo", "again", made["command"]]
    assert [row[1] for row in rows if row[0] == "command"] == commands
    headings = re.findall("<h3>(Training of [^<]*)</h3>", written.path.read_text())
    assert headings == ["Training of grpo-0, grpo-1, gspo-0", "Training of gspo-0"]
    for row in (["commit", "abc with changes"], ["versions", "jax 9.9"], ["hardware", "1 x abacus"]):
        assert row in rows
    assert ["clip_high", "0.2", "0.0004"] in rows
    assert "img" not in {tag for tag, _ in Page(written.path.read_text()).tags}
    # Every figure of the page has its files, every table its own.
    names = {f"curve-{name}" for name in ("reward", "eval_accuracy", "entropy", "seconds")}
    assert names < {path.stem for path in (where / "report.figures").glob("*.svg")}
    lines = (where / "report.tables" / "accuracy.csv").read_text().splitlines()
    assert lines[0].startswith("loss,seeds,before,after,after_low") and lines[1].startswith("grpo,2,0.5,0.7,")
    assert {path.stem for path in (where / "report.tables").iterdir()} == {
        "accuracy", "accuracy-by-seed", "end-of-training", "options",
    }  # fmt: skip
    # What is missing is said, and how to get it; with matplotlib the same figures are there in its formats.
    assert plots.MISSING in written.files and "jaxreason[report]" in written.path.read_text()
    drawn = []
    monkeypatch.setattr(plots, "available", lambda: True)
    monkeypatch.setattr(plots, "write", lambda figure, stem: drawn.append(stem))
    assert plots.MISSING not in report.write_report(where, paths).files
    assert {stem.name for stem in drawn} == {path.stem for path in (where / "report.figures").iterdir()}


def test_every_metric_of_a_run_is_explained(two_losses):
    where, paths = two_losses
    text = report.write_report(where, paths).path.read_text()
    assert explain.METRICS["entropy"][1] in text
    assert text.count("jaxreason attaches no meaning to it") == 1  # a metric of one's own


def test_charts_carry_the_values_for_the_cursor(two_losses):
    where, paths = two_losses
    page = Page(report.write_report(where, paths).path.read_text())
    drawn = [a for tag, a in page.tags if tag == "g" and a.get("data-label") == "gspo"]
    assert [2, "0.700", "0.200", "1.20"] in [v for a in drawn for v in json.loads(a["data-values"])]  # entropy, step 2
    accuracy = next(v for a in drawn if len(v := json.loads(a["data-values"])) == 2)
    assert accuracy == [[0, "0.500", "0.500", "0.500"], [10, "0.800", "0.700", "0.900"]]
    width = {tag: a for tag, a in page.tags}["svg"]["viewbox"]
    assert width == f"0 0 {charts.WIDTH} {charts.HEIGHT}"


def test_one_seed_has_no_interval(two_losses):
    where, paths = two_losses
    assert cli.compare(["--report-only", str(paths[0]), str(paths[2]), "--out", str(where / "one")]) == 0
    text = (where / "one" / "report.html").read_text()
    rows = Page(text).rows
    assert ["grpo", "1", "50.0", "60.0", "–", "+10.0", ""] in rows
    assert ["gspo", "1", "50.0", "70.0", "–", "+20.0", "+10.0"] in rows
    assert "no claim about which is better" in text


# ---- planning and training


def test_the_plan_changes_loss_seed_and_place_only(tmp_path):
    words = ["run.seed=4", "loss.options.clip_low=0.1"]
    entries = runs.entries_of("grpo", ["grpo", "dapo@clip_high=0.3"], 2, words, str(tmp_path))
    assert [item.path for item in entries] == [
        tmp_path / name for name in ("grpo-seed4", "grpo-seed5", "dapo-clip_high-0.3-seed4", "dapo-clip_high-0.3-seed5")
    ]
    last = entries[-1].config
    assert (last.loss.name, last.loss.options, last.run.seed) == ("dapo", {"clip_low": 0.1, "clip_high": 0.3}, 5)
    base = json.loads(cfg.load("grpo", words).model_dump_json())
    changed = cfg.differences(base, json.loads(last.model_dump_json()))
    assert set(changed) == {"loss.name", "loss.options.clip_high", "run.dir", "run.name", "run.seed"}
    assert runs.folder(cfg.load("grpo"), None) == Path("runs/grpo-compare")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--config", "grpo", "--losses", "drgrpo,grpo"], "'drgrpo' is unknown; did you mean dr_grpo?"),
        (["--config", "grpo", "--losses", "nll"], "loss nll is a sft loss"),
        (["--config", "grpo", "--losses", "no.py:f"], "no such file"),
        (["--config", "grpo", "--losses", "grpo@clip_hgh=0.3"], "did you mean clip_high?"),
        (["--config", "grpo", "--losses", "grpo@clip_high"], "not of the form key=value"),
        (["--config", "grpo", "--losses", "grpo,grpo"], "would be the same run grpo"),
        (["--config", "grpo", "--losses", "grpo,"], "a name is empty"),
        (["--config", "grpo", "--losses", "grpo", "--seeds", "0"], "--seeds 0"),
        (["--config", "sft", "--losses", "nll", "--offline"], "this config's algorithm is sft"),
        (["--config", "grpo"], "give --config NAME and --losses"),
        (["--report-only", "x", "--config", "grpo"], "goes with --out alone"),
        (["--report-only", "runs/none"], "runs/none: no config.yaml"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_message_before_anything_trains(argv, part, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out")]
    assert cli.compare([*argv, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and part in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_loss_that_fails_on_its_way_does_not_stop_the_others(tmp_path, monkeypatch):
    entries = runs.entries_of("grpo", ["grpo", "gspo", "cispo"], 1, [], str(tmp_path))
    trained = []

    def train(config):
        trained.append(config.loss.name)
        if config.loss.name == "gspo":
            make_run(tmp_path, config.run.name, 0, [{"step": 1, "reward": 0.1}], "loss.name=gspo", finished=False)
            raise UserError("step 2: loss is nan")
        make_run(tmp_path, config.run.name, 0, [{"step": 2, "reward": 0.5}], f"loss.name={config.loss.name}")
        return {}

    monkeypatch.setattr(runs.grpo, "train", train)
    monkeypatch.setattr(work, "check", lambda entries: None)
    with pytest.raises(UserError, match="gspo-seed0: step 2: loss is nan"):
        work.train(entries)
    assert trained == ["grpo", "gspo", "cispo"]
    assert re.search(r"gspo-seed0</th><td>gspo</td><td>0</td><td>1</td><td>unfinished", (tmp_path / "report.html").read_text())
    # What fails before its first step would fail for every loss.
    monkeypatch.setattr(runs.grpo, "train", lambda config: (_ for _ in ()).throw(UserError("no such weights")))
    with pytest.raises(UserError, match="^no such weights$"):
        runs.train_all(runs.entries_of("grpo", ["grpo", "gspo"], 1, [], str(tmp_path / "other")))
    # A person's interrupt ends the comparison and reports nothing.
    monkeypatch.setattr(runs.grpo, "train", lambda config: None)
    assert runs.train_all(entries) is None


def script(*argv) -> str:
    """The command in a process of its own, on one device, and what it printed."""
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), *argv]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_losses_train_from_the_same_start_and_are_not_trained_twice(tmp_path, capsys):
    argv = ["--config", "grpo", "--losses", "bnpo,cispo", "--seeds", "1", "--out", str(tmp_path / "out"),
            *grpo_words(tmp_path, "train.steps=2")]  # fmt: skip
    script(*argv)
    first = {name: read_run(tmp_path / "out" / f"{name}-seed0") for name in ("bnpo", "cispo")}
    # At step 1 nothing but the loss differs: the same completions, the same rewards, and at ratio 1 the same gradient.
    a, b = (run.records[0] for run in first.values())
    for key in ("reward", "completion_tokens", "entropy"):
        assert a[key] == b[key]
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5) and a["grad_norm"] > 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "attaches no meaning" not in text  # whatever a run records by itself is explained
    page = Page(text)
    commands = [row[1] for row in page.rows if row[0] == "command"]  # of both runs, which one process started, and of the report
    assert len(commands) == 2 and all("scripts/compare.py --config grpo" in command for command in commands)
    assert [row for row in page.rows if row[0].endswith("-seed0")] == [
        [str(tmp_path / "out" / f"{name}-seed0"), name, "0", "2", "finished"] for name in ("bnpo", "cispo")
    ]
    assert cli.compare(argv) == 0
    assert capsys.readouterr().out.count("is finished") == 2


# ---- offline


def test_cosines_by_hand():
    a, b, zero = [np.array([3.0]), np.array([4.0, 0.0])], [np.array([0.0]), np.array([2.0, 0.0])], [np.zeros(1), np.zeros(2)]
    found = gradients.cosines([a, b, zero])
    assert found[0][0] == found[1][1] == 1.0
    assert found[0][1] == found[1][0] == pytest.approx(8 / (5 * 2))
    assert found[2] == [None] * 3 and found[0][2] is None


def test_what_the_network_pulls_back_is_the_gradient():
    """A twin: the loss differentiated through the network as training does, with an entropy bonus, a KL and empty rows."""
    config = model.make_config(
        vocab_size=128, embed_dim=32, mlp_dim=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, init_std=0.2
    )
    params = model.init(config, jax.random.key(0))
    sequences = [sequence(3 + i % 4, 2 + i % 5, i // 4, advantage=(-1.0) ** i * (1 + i) / 16) for i in range(8)]
    batch = jax.tree.map(jnp.asarray, batch_of(sequences, 16, 8, 4))
    stats = jax.jit(make_score(config, 4, 0.7))(params, batch)
    noise = jax.random.normal(jax.random.key(1), stats.logp.shape) * 0.3
    batch = dataclasses.replace(batch, old_logp=stats.logp + noise, ref_logp=stats.logp - noise)
    loss = losses.get("dapo", entropy_coef=0.1, kl_coef=0.2)
    value, metrics, by_input = jax.jit(gradients.value_of(loss))(stats, batch)
    pulled = dataclasses.replace(batch, extras=dict(zip(gradients.PULL, by_input)))
    found = jax.jit(gradients.pullback(config, [loss], 4, 0.7))(params, pulled)[2]
    direct = jax.jit(make_gradient(config, loss, 4, 0.7))(params, batch)
    np.testing.assert_allclose(value, direct[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], direct[1]["ratio_max"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, direct[2])


def weight(name: str, log_ratio: float, sign: str, **options) -> float:
    at = int(np.argmin(np.abs(probe.LOG_RATIOS - log_ratio)))
    return probe.weight_curve(losses.get(name, **options), {})[sign][at]


def test_weight_curves_by_hand():
    """−∂L/∂log p of a token is A w while the ratio w is within its bounds, and 0 where the bound is reached."""
    rises, falls = math.log(1.2) + 0.1, math.log(0.8) - 0.1
    assert weight("grpo", 0.0, "positive") == 1.0 and weight("grpo", 0.0, "negative") == -1.0
    assert weight("grpo", 0.15, "positive") == pytest.approx(math.exp(0.15), rel=1e-3)
    assert weight("grpo", rises, "positive") == 0.0 and weight("grpo", falls, "negative") == 0.0
    assert weight("grpo", falls, "positive") > 0.7 and weight("grpo", 2.0, "negative") == pytest.approx(-math.exp(2), rel=1e-3)
    assert weight("cispo", 1.0, "positive") == pytest.approx(math.e, rel=1e-3)
    assert weight("cispo", 2.0, "positive") == 5.0  # its cap
    assert weight("reinforce", 1.5, "negative") == -1.0
    # k3's pull, of the KL to a reference that is the old policy: 1 - exp(-x), in units of the loss at ratio 1
    pulled = weight("grpo", 0.1, "positive", kl_coef=0.5) - weight("grpo", 0.1, "positive")
    assert pulled == pytest.approx(-0.5 * (1 - math.exp(-0.1)), abs=1e-3)
    # the scale of an aggregation is not in it
    assert weight("dr_grpo", 0.1, "positive") == weight("grpo", 0.1, "positive")


def test_a_loss_that_is_zero_or_not_finite_somewhere_has_gaps(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text("""
import jax.numpy as jnp
def odd(inputs):
    x = inputs.logp - inputs.old_logp
    return jnp.sum(jnp.where(inputs.mask > 0, jnp.sqrt(x) * inputs.extras["bonus"], 0.0)), {}
""")
    curve = probe.weight_curve(losses.get(f"{file}:odd"), {"bonus": 2.0})["positive"]
    assert curve[0] is None and curve[80] is None and curve[-1] is not None
    assert curve[81] == -1.0  # at ratio 1 it is infinite, so the largest finite weight is the unit


def test_effective_options_say_defaults_and_changes(tmp_path):
    found = [
        options.effective(cfg.load("grpo", ["loss.name=grpo", "loss.options.clip_high=0.3", "kl.coef=0.1"])),
        options.effective(cfg.load("grpo", ["loss.name=dr_grpo"])),
        options.effective(cfg.load("sft")),
    ]
    table = options.options_table(["a", "b", "c"], found)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["clip_high"] == ["0.3 •", "0.2", ""] and rows["clip_low"] == ["0.2", "0.2", ""]
    assert rows["kl_coef"][0] == "0.1 •" and rows["advantage"] == ["grpo", "center", ""]
    assert rows["max_completion_tokens"][1] == "128 •"  # of the rollout
    assert rows["reduce"] == ["seq-mean-token-mean", "token-sum/const", "token-mean"]
    assert table.records[0] == {"option": "loss", "a": "grpo", "b": "dr_grpo", "c": "nll"}
    lost = options.of_run(json.loads(cfg.load("grpo", [f"loss.name={tmp_path}/gone.py:f"]).model_dump_json(by_alias=True)))
    note = options.options_table(["x"], [lost]).notes[-1]
    assert note.startswith("x: ") and "no such file" in note and lost["values"]["loss"].endswith("gone.py:f")


def measurement(names: list[str]) -> dict:
    """Of three losses."""
    rows = [{"value": 0.1, "grad_norm": n} for n in (0.5, 0.1, 0.4)]
    points = {"start": {"rows": rows, "cosine": [[1.0, 0.9999, 0.2], [0.9999, 1.0, 0.25], [0.2, 0.25, 1.0]]},
              "stale": {"rows": rows[:1] * 3, "cosine": [[None] * 3] * 3}}  # fmt: skip
    rollout = {"model": "m", "data": EVIL, "seed": 0, "learning_rate": 0.1, "prompts": 2, "group_size": 2, "corrections": 3,
               "teacher": EVIL, "tokens": 9, "reward": 0.5, "zero_std_fraction": 1.0}  # fmt: skip
    signs = ("positive", "negative")
    return {
        "format": read.FORMAT, "losses": names, "points": points, "rollout": rollout,
        "options": [{"values": {"loss": name}, "changed": []} for name in names],
        "curve": [{sign: [1.0] * len(probe.LOG_RATIOS) for sign in signs}, *[{sign: [None] for sign in signs}] * 2],
        "tokens": [{sign: [[0.0, 1.0]] for sign in signs}, *[{sign: [] for sign in signs}] * 2],
    }  # fmt: skip


def test_one_page_shows_runs_and_a_measurement(two_losses):
    where, paths = two_losses
    read.write_offline(where, measurement([EVIL, "b", "c"]))
    for runs_found in (paths, []):
        written = report.write_report(where, runs_found)
        page = Page(written.path.read_text())
        assert "img" not in {tag for tag, _ in page.tags}
        assert [EVIL, "0.100", "0.500"] in page.rows and [EVIL, "1.0000", "0.9999", "0.2000"] in page.rows
        assert "each corrected 3 times, judged by the teacher &lt;script&gt;" in written.path.read_text()
        assert any("step in one direction" in s for s in written.headline.supported)
        assert (where / "report.figures" / "offline-start-cosine.svg").is_file()


def test_the_headline_of_a_measurement_names_what_was_found():
    said = headline.headline([], measurement(["a", "b", "c"]))
    assert said.supported == [
        "at ratio 1, b and a step in one direction (cosine above 0.999)",
        "at ratio 1, a and c are furthest apart: cosine 0.20 on this rollout",
        "at ratio 1, the gradient of a is 5.0 times as long as that of b (0.500, 0.100)",
    ]
    assert any(s.startswith("which loss trains better") for s in said.unsupported)


def test_measured_tokens_are_shown_within_the_bulk_of_log_ratios():
    tokens = [[i / 100, 1.0] for i in range(-9, 10)] + [[-4.0, 3.0]]
    found = {"losses": ["a"], "rollout": {"learning_rate": 0.1}, "tokens": [{"positive": tokens, "negative": []}]}
    chart = measured._dots(found, "positive", [0])
    assert len(chart.dots[0].points) == 19 and "5 % of the tokens lie outside" in chart.note
    assert measured._dots(found, "negative", [0]) is None


def test_a_measured_loss_has_the_colour_of_its_runs():
    assert measured.indices({"losses": ["b", "new", "a", "other"]}, ["a", "b", "c"]) == [1, 3, 0, 4]


def test_a_measurement_of_another_version_is_refused(tmp_path):
    (tmp_path / "offline.json").write_text('{"losses": ["grpo"]}')
    with pytest.raises(UserError, match="run --offline again"):
        read.read_offline(tmp_path)


def test_offline_sees_the_second_turn_and_the_teacher(tmp_path):
    """Whatever training adds to a batch is in the comparison's: 8 completions and 16 corrections, and a teacher's part."""
    base = grpo_words(tmp_path, "rollout.prompts_per_step=2", "second_turn.samples=2", "second_turn.train=all")
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, "run.name=start", "train.steps=1")]) == 0
    found = {}
    teacher = [f"teacher.weights={tmp_path / 'start'}", "teacher.coef=3"]
    for name, words in (("alone", []), ("taught", teacher), ("distilled", [*teacher, "teacher.divergence=reverse_kl"])):
        out = str(tmp_path / name)
        argv = ["--config", "grpo", "--losses", "bnpo", "--offline", "--out", out, *base, *words]
        assert cli.compare(argv) == 0
        found[name] = json.loads((tmp_path / name / "offline.json").read_text())
    assert found["alone"]["rollout"]["tokens"] == found["taught"]["rollout"]["tokens"] > 8 * 16
    norms = [f["points"]["start"]["rows"][0]["grad_norm"] for f in found.values()]
    assert min(abs(a - b) for a, b in itertools.combinations(norms, 2)) > 1e-4 * norms[0]
    # The weights of single tokens are measured where log-probs and entropies are all that a loss reads.
    assert [any(f["tokens"][0].values()) for f in found.values()] == [True, True, False]


def test_offline_measures_values_norms_and_angles(tmp_path):
    argv = ["--config", "grpo", "--losses", "bnpo,dapo", "--offline", "--out", str(tmp_path / "out"),
            *grpo_words(tmp_path, "optimizer.learning_rate=0.03")]  # fmt: skip
    script(*argv)
    found = json.loads((tmp_path / "out" / "offline.json").read_text())
    start, stale = found["points"]["start"], found["points"]["stale"]
    for row in start["rows"]:
        assert row["ratio_min"] == row["ratio_max"] == 1.0 and row["clip_fraction"] == 0.0 and row["grad_norm"] > 0
    # At ratio 1 a wider clip is the same loss; where ratios spread it is not.
    assert start["cosine"][0][1] == pytest.approx(1.0, abs=1e-9)
    assert start["rows"][0]["grad_norm"] == pytest.approx(start["rows"][1]["grad_norm"], rel=1e-6)
    assert 0.5 < stale["cosine"][0][1] < 1 - 1e-6
    assert stale["rows"][0]["ratio_min"] < 0.99 and stale["rows"][0]["ratio_max"] > 1.01
    assert stale["rows"][0]["clip_fraction"] > stale["rows"][1]["clip_fraction"] > 0
    assert (found["losses"], found["options"][1]["values"]["clip_high"]) == (["bnpo", "dapo"], 0.28)
    # The curve of dapo is wider than bnpo's above, where A > 0, and the tokens that were measured lie on it.
    log_ratio = int(np.argmin(np.abs(probe.LOG_RATIOS - 0.225)))
    assert [curve["positive"][log_ratio] for curve in found["curve"]] == [0.0, pytest.approx(math.exp(0.225), rel=1e-3)]
    for ratio, weighed in found["tokens"][0]["positive"]:
        assert weighed == pytest.approx(math.exp(ratio) if ratio < math.log(1.2) else 0.0, rel=2e-3)
    assert "--offline" in found["origin"]["command"]
    page = Page((tmp_path / "out" / "report.html").read_text())
    cosine = f"{stale['cosine'][0][1]:.4f}"
    assert [row for row in page.rows if row[0] == "dapo" and len(row) == 3] == [
        ["dapo", "1.0000", "1.0000"], ["dapo", cosine, "1.0000"],
    ]  # fmt: skip
