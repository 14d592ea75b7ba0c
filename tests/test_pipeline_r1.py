"""The R1 pipeline on a tiny model: five stages in one command, nothing done twice, and what a person gets wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import DIGITS, TINY

from jaxreason import cli, pipeline
from jaxreason import config as cfg
from jaxreason.config.parse import parse_words
from jaxreason.data import schema
from jaxreason.errors import UserError
from jaxreason.report import pipeline as report

ROOT = Path(__file__).resolve().parents[1]


def words(root: Path) -> list[str]:
    """Overrides that make every stage of r1 one of seconds: any finished trace is good, and digits are rewarded."""
    root.mkdir(exist_ok=True)
    (root / "graders.py").write_text(DIGITS)
    graded = ["eval.workers=1", "eval.slots=4", f"eval.grader={root / 'graders.py'}:constant"]
    small = ["data.workers=0", f"data.cache_dir={root / 'cache'}", "data.max_length=128", "data.batch_size=2", "data.eval_rows=0",
             "train.steps=2", "train.save_every=0", "optimizer.warmup_steps=1", "eval.problems=0"]  # fmt: skip
    rl = ["data.max_rows=20", "train.steps=1", "train.save_every=0", "train.eval_every=0", "rollout.prompts_per_step=2",
          "rollout.group_size=2", "rollout.max_completion_tokens=8", "rollout.slots=4", "eval.problems=8", "reward.workers=1",
          "eval.max_completion_tokens=8", *graded, "optimizer.warmup_steps=0",
          f"reward.functions=[{{name: '{root / 'graders.py'}:digits'}}]"]  # fmt: skip
    drawn = ["max_rows=16", "max_completion_tokens=64", "format=any", "reward.workers=0", "slots=64", "per_prompt=null",
             f"reward.functions=[{{name: '{root / 'graders.py'}:constant'}}]"]  # fmt: skip
    stages = {
        "cold_start": [*TINY, "data.max_rows=50", *small],
        "sft_2": [*small, "data.eval_source=null"],
        "rl_1": rl,
        "rl_2": rl,
        "rejection": drawn,
    }
    return [f"dir={root / 'r1'}", *(f"{stage}.{word}" for stage, own in stages.items() for word in own)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    env = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(root / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # one device; compiling is what takes the time
    command = [sys.executable, str(ROOT / "scripts" / "pipeline.py"), "--config", "r1", *words(root)]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr
    return root


STAGES = ["cold_start", "rl_1", "rejection", "sft_2", "rl_2"]


def test_five_stages_leave_five_folders_and_a_table(made):
    root = made / "r1"
    done = json.loads((root / "pipeline.json").read_text())
    assert [(stage["name"], stage["kind"]) for stage in done] == list(zip(STAGES, ["sft", "grpo", "build", "sft", "grpo"]))
    configs = {name: yaml.safe_load((root / name / "config.yaml").read_text()) for name in STAGES if name != "rejection"}
    starts = {
        name: config["resolved"]["weights"] and Path(config["resolved"]["weights"]).parts[-3] for name, config in configs.items()
    }
    assert starts == {"cold_start": None, "rl_1": "cold_start", "sft_2": "cold_start", "rl_2": "sft_2"}
    assert [configs[name]["run"]["seed"] for name in configs] == [0, 1, 3, 4]
    for stage in done:
        if stage["kind"] != "build":
            assert (root / stage["name"] / "report.html").is_file()
            found = report.Done(**stage).accuracy
            assert (found is None) == (stage["kind"] == "sft")  # whose evaluation these words leave out
            if found:  # all of 8: Wilson's interval begins at 8 / (8 + 1.96²)
                assert found == (1.0, pytest.approx(8 / (8 + 1.959964**2)), 1.0)
    rows = [json.loads(line) for line in (root / "rejection" / "rows.jsonl").read_text().splitlines()]
    assert 0 < len(rows) == done[2]["found"]["kept"] and done[2]["found"]["drawn"] == 16 * 4
    assert all(schema.detect(row) == "messages" and "rl_1" in row["model"] and row["seed"] == 2 for row in rows)


def test_one_page_shows_all_stages(made, tmp_path, capsys):
    """By hand: accuracies of 25 and 50 %, 30 of 40 traces kept; links to the pages that are there, markup escaped."""
    root = made / "r1"
    page = (root / "report.html").read_text()
    linked = [name for name in STAGES if f'<a href="{name}/report.html">{name}</a>' in page]
    assert linked == ["cold_start", "rl_1", "sft_2", "rl_2"]
    assert cli.report([str(root)]) == 0 and (root / "report.html").read_text() == page
    ends = ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high")
    measured = {"step": 7, "train_seconds": 90.0, "eval_completion_tokens": 41.6}
    accuracies = [dict(zip(ends, values)) for values in ((0.25, 0.2, 0.3), (0.5, 0.4, 0.6))]
    stages = [
        {"name": "a<b", "kind": "sft", "found": measured | accuracies[0]},
        {"name": "made", "kind": "build", "found": {"kept": 30, "drawn": 40, "dropped": {"too <long": 10}}},
        {"name": "c", "kind": "grpo", "found": measured | accuracies[1]},
    ]
    (tmp_path / report.FILE).write_text(json.dumps(stages))
    assert cli.report([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "a&lt;b 25.0 % (20.0–30.0) → c 50.0 % (40.0–60.0). The highest is c&#39;s." in page and "a<b" not in page
    assert "<td>kept 30 of 40</td>" in page and "<td>7 steps</td><td>1.5 min</td>" in page and "<td>42</td>" in page
    assert "too &lt;long" in page and "href" not in page
    for damaged in ('[{"name": 1}]', "[", "{}", json.dumps([{"name": "a", "kind": "build", "found": {"kept": 1}}])):
        (tmp_path / report.FILE).write_text(damaged)
        assert cli.report([str(tmp_path)]) == 2 and "pipeline.json is damaged" in capsys.readouterr().err
    assert cli.report([str(root), str(root / "rl_1")]) == 2 and "is a pipeline" in capsys.readouterr().err


def test_the_same_command_does_nothing_twice(made, monkeypatch, capsys):
    for module in (pipeline.sft, pipeline.grpo):
        monkeypatch.setattr(module, "train", lambda config: pytest.fail(f"{config.run.name} was trained again"))
    before = (made / "r1" / "rejection" / "rows.jsonl").stat().st_mtime_ns
    assert cli.pipeline(["--config", "r1", *words(made)]) == 0
    assert (made / "r1" / "rejection" / "rows.jsonl").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert (
        shown.count("is finished") == 4
        and "held-out accuracy" in shown
        and re.search(r"kept \d+ of 64", shown)
        and shown.count("100.0 % (67.6–100.0)") == 2
        and shown.count("not measured") == 2
    )


def test_a_stage_without_a_summary_is_run_and_one_that_is_stopped_ends_the_command(made, monkeypatch):
    kept = (made / "r1" / "rl_2" / "summary.json").read_text()
    (made / "r1" / "rl_2" / "summary.json").unlink()
    asked = []
    monkeypatch.setattr(pipeline.grpo, "train", lambda config: asked.append(config.run.name))
    assert cli.pipeline(["--config", "r1", *words(made)]) == cli.STOPPED and asked == ["rl_2"]
    (made / "r1" / "rl_2" / "summary.json").write_text(kept)


def test_a_stage_of_another_config_is_refused_before_any_runs(made, capsys):
    assert cli.pipeline(["--config", "r1", *words(made), "rl_2.optimizer.learning_rate=1e-3"]) == 2
    out = capsys.readouterr()
    assert "optimizer.learning_rate" in out.err and "stage 1/5" not in out.out


def test_a_stage_of_other_weights_is_refused(made, monkeypatch, capsys):
    class Other:
        def digest(self):
            return "other"

    monkeypatch.setattr(pipeline, "locate", lambda name: Other())
    assert cli.pipeline(["--config", "r1", *words(made)]) == 2
    assert "rl_1 was trained from other weights than" in capsys.readouterr().err


def test_words_reach_the_stage_that_they_name():
    plan, configs = cfg.load_pipeline("r1", ["rejection.samples=2", "rejection.per_prompt=1", "rl_2.train.steps=7", "seed=3"])
    assert plan.stages[2].build.samples == 2 and configs["rejection"].per_prompt == 1 and configs["rejection"].seed == 302
    assert configs["rl_2"].train.steps == 7 and configs["rl_1"].train.steps == 40 and configs["rl_2"].run.seed == 304


STAGE = {"name": "a", "config": "sft"}


@pytest.mark.parametrize(
    "stages, message",
    [
        ([STAGE, STAGE], "stage a is there twice"),
        ([{"name": "a"}], "stage a: give exactly one of config"),
        ([STAGE, {"name": "b", "config": "grpo", "start": "c"}], "start is c, no earlier stage that trains; known: a"),
        ([STAGE, {"name": "b", "config": "sft", "data": "a"}], "data is a, no earlier stage that builds data; known: none"),
        ([STAGE, {"name": "b", "build": {"source": "x"}}], "build needs start"),
    ],
)
def test_stages_that_do_not_fit_together_are_one_message(stages, message):
    with pytest.raises(UserError, match=message):
        parse_words(cfg.Pipeline, [], {"dir": "x", "stages": stages})


@pytest.mark.parametrize(
    "word, message",
    [("rl_.train.steps=3", "no stage rl_; did you mean rl_"), ("rl_1.train.stps=3", "did you mean train.steps"),
     ("rejection.max_rogue=1", "did you mean max_rouge"), ("sede=1", "did you mean seed")],
)  # fmt: skip
def test_a_wrong_word_is_one_message(word, message, capsys):
    assert cli.pipeline(["--config", "r1", word]) == 2
    assert message in capsys.readouterr().err


def test_every_pipeline_in_configs_loads():
    """The one of three billion parameters fine-tunes the base model twice, as R1 does, the second time on what was built."""
    names = sorted(path.stem for path in (ROOT / "configs" / "pipeline").glob("*.yaml"))
    assert names == ["r1", "r1-llama3.2-3b"]
    large = cfg.load_pipeline("r1-llama3.2-3b", ["dir=runs/x", "rejection.samples=8"])[1]
    assert large["sft_2"].model.weights == large["cold_start"].model.weights == "meta-llama/Llama-3.2-3B"
    assert large["sft_2"].data.source == "runs/x/rejection/rows.jsonl" and large["rl_2"].model.weights == "runs/x/sft_2"
    assert not large["sft_2"].data.keep_only_correct  # its rows have no column of it
