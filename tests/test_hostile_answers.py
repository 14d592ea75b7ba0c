"""Answers that are made to hang a grader cost their own problem, and a run can be stopped meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import sft_words

from jaxreason import checkpoint
from jaxreason.data.prompts import Prompt
from jaxreason.evaluate.accuracy import Grading, evaluate
from jaxreason.rewards import get
from jaxreason.sampler import Completion, Job, Sampling

ROOT = Path(__file__).resolve().parents[1]

# Answers that sympy would work on for minutes to for ever, and golds beside them that make it begin.
HOSTILE = {
    r"9^{9^{9}}": "x+1", r"(x+y+z)^{500}": "x^2+y", r"10^{10^{10}}": r"\sqrt{2}", r"\int_0^1 e^{-x^{x^{x}}} dx": r"\frac{\pi}{4}",
    r"(10^9)!": "n!", r"\sum_{n=1}^{10^{9}} \frac{1}{n}": r"\ln 2",
}  # fmt: skip


class Said:
    """A sampler that answers prompt i with the text i."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts, job, progress=None):
        found = []
        for i, text in enumerate(self.texts):
            tokens = np.array([*text.encode(), 0], np.int32)
            found.append(Completion(i, 0, tokens, tokens * 0.0, tokens * 0.0, False, 0))
        return found


class Bytes:
    def decode(self, ids):
        return bytes(int(i) for i in ids).decode()


def test_an_evaluation_grades_in_processes_that_are_killed(capsys):
    """Every problem beside the hostile ones keeps its grade; a hang is no grade, and it is counted and named."""
    golds = [*HOSTILE.values(), "x+1", "7"]
    texts = [rf"\boxed{{{answer}}}" for answer in HOSTILE] + [r"\boxed{1+x}", r"\boxed{8}"]
    prompts = [Prompt((1,), "q", gold, "q", i) for i, gold in enumerate(golds)]
    job, began = Job(Sampling(temperature=0.0, max_completion_tokens=99)), time.monotonic()
    metrics, records = evaluate(Said(texts), prompts, Bytes(), Grading(get("accuracy"), 2, 2.0), job)
    assert time.monotonic() - began < 40
    assert [record["correct"] for record in records] == [False] * len(HOSTILE) + [True, False]
    assert metrics["ungraded"] >= 3 and metrics["problems"] == len(golds) - metrics["ungraded"]
    assert metrics["accuracy"] == 1 / metrics["problems"]
    assert "timeout: took more than 2.0 s" in capsys.readouterr().out


GRADER = """
import os, pathlib, time

def grade(sample):
    pathlib.Path(os.environ["BEGAN"]).touch()
    if os.path.exists(os.environ["HANG"]):
        time.sleep(600)
    return 1.0
"""


@pytest.mark.parametrize(("every", "step"), [(2, 2), (0, 4)])
def test_a_run_that_is_told_to_stop_leaves_a_hanging_evaluation(every, step, tmp_path):
    """SIGTERM in an evaluation that would last ten minutes: the step is saved, and the same command evaluates it."""
    (tmp_path / "hang.py").write_text(GRADER)
    hang, began, run = tmp_path / "hang", tmp_path / "began", tmp_path / "sft"
    hang.touch()
    words = [word for word in sft_words(tmp_path, "train.steps=4") if not word.startswith("eval.problems")]
    words += [f"train.eval_every={every}", f"eval.grader={tmp_path}/hang.py:grade", "eval.problems=4", "eval.timeout_s=600"]
    env = os.environ | {"HANG": str(hang), "BEGAN": str(began), "PYTHONPATH": str(ROOT)}
    start = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "sft", *words, "eval.max_completion_tokens=8"]
    process = subprocess.Popen(start, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not began.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert f"told to stop: the evaluation after step {step} is left out" in out
    assert checkpoint.steps(run / "checkpoints") == [step] and not (run / "summary.json").exists()
    hang.unlink()
    assert subprocess.run(start, cwd=ROOT, env=env, capture_output=True, check=False).returncode == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_accuracy" in line] == ([2, 4] if every else [4])
    assert json.loads((run / "summary.json").read_text())["eval_accuracy"] == 1.0
