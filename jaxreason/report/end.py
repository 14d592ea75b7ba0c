"""What a person reads when a run ends: what it measured, one of its samples, its page, and what to do next."""

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxreason.paths import local
from jaxreason.report.charts import short
from jaxreason.report.pipeline import Done, write_pipeline_report
from jaxreason.report.read import Run, number, read_run
from jaxreason.report.run import learned, write_run_report
from jaxreason.terminal import console, seconds

_SHOWN_CHARACTERS = 800  # of a prompt or completion


def show(folder: str, told: Callable[[str], str], page: bool = True) -> None:
    """Prints the end of the run in ``folder``, and writes its report.html first where ``page`` says so.

    ``told``: how a person starts a command. The run is done and whole: what fails here is one line, never its failure.
    """
    with _survived(folder, told):
        run = read_run(local(folder))
        lines = said(run, folder)
        if page:
            lines.append(f"report: {write_run_report(local(folder))}")
        for line in [*lines, "", "next:", *(f"  {line}" for line in commands(run.config, folder, told))]:
            console.print(line, markup=False, soft_wrap=True)  # a command that is wrapped cannot be copied


def write(folder: str, told: Callable[[str], str]) -> None:
    """Writes a run's report.html, without a word where that succeeds."""
    with _survived(folder, told):
        write_run_report(local(folder))


def of_pipeline(root: Path, stages: Sequence[Done], told: Callable[[str], str]) -> None:
    """Writes a pipeline's report.html and says where it is."""
    with _survived(str(root), told):
        console.print(f"report: {write_pipeline_report(root, stages)}", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _survived(folder: str, told: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is: of a page, not of the run
        failed, again = f"{type(error).__name__}: {error}", f"{told('report')} {shlex.quote(folder)}"
        console.print(f"warning: the run is done, but its report failed ({failed}); try: {again}", markup=False, soft_wrap=True)


def said(run: Run, folder: str) -> list[str]:
    """The headline, the sample, and where all numbers are."""
    summary = run.summary or {}
    done = [f"{run.last_step:,} steps"]
    if (tokens := number(summary.get("trained_tokens"))) is not None:
        done.append(f"{tokens:,.0f} tokens trained")
    if (spent := number(summary.get("train_seconds"))) is not None:
        done.append(seconds(spent))
    lines = ["", f"{folder} is done: {', '.join(done)}.", learned(run, "95 % interval ")]
    losses = [value for value in run.series("eval_loss").values() if value is not None]
    if losses and run.last("eval_accuracy") is not None:
        lines.append(f"Held-out loss {' → '.join(map(short, dict.fromkeys((losses[0], losses[-1]))))} nats a token.")
    lines += _sample(run)
    return [*lines, "", f"all numbers: {folder}/summary.json"]


def _sample(run: Run) -> list[str]:
    """The first completion of the last step, not the best one; nothing of a run that draws none."""
    if not run.samples:
        return []
    sample = run.samples[0]
    earned = "no reward" if sample["reward"] is None else f"reward {sample['reward']:.3g}"
    cut = ", cut off" if sample["truncated"] else ""
    head = f"a sample of step {sample['step']} ({earned}, {sample['tokens']} tokens{cut}; right is "
    right = _printable(str(sample["gold"]))
    return ["", f"{head}{right}):", *_indented(sample["prompt"]), "  ↳", *_indented(sample["completion"])]


def _indented(text: str) -> list[str]:
    left = len(text) - _SHOWN_CHARACTERS
    shown = text if left <= 0 else f"{text[:_SHOWN_CHARACTERS]} … ({left:,} more characters)"
    return [f"  {_printable(line)}" for line in shown.split("\n")]


def _printable(text: str) -> str:
    """Without the characters by which a text moves a terminal's cursor or changes its colours."""
    return "".join(c if c.isprintable() or c == "\t" else "�" for c in text)


def commands(config: dict[str, Any], folder: str, told: Callable[[str], str]) -> list[str]:
    """What one does with the model of a run, ready for a shell."""
    model, data, evaluation = shlex.quote(folder), config["data"], config["eval"]
    limit = f"max_completion_tokens={evaluation['max_completion_tokens']}"
    task = (data["eval_source"] or data["source"]) if evaluation["problems"] else "gsm8k"
    asked = [shlex.quote(f"{key}={data[key]}") for key in ("system_prompt", "template") if data[key] is not None]
    split = [f"split={shlex.quote(data['eval_split'])}"] if data["eval_split"] else []
    form = "to-peft" if (config.get("lora") or {}).get("rank") else "to-hf"
    out = shlex.quote(f"{Path(folder).name}-{form.removeprefix('to-')}")
    return [
        " ".join([told("generate"), "--model", model, "--chat", limit, *asked]),
        " ".join([told("evaluate"), "--model", model, "--task", shlex.quote(task), *split, limit, *asked]),
        " ".join([told("report"), model]),
        " ".join([told("convert"), form, model, out]),
    ]
