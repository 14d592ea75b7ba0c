"""Rows for SFT from a model's verified traces: what build_data.py does."""

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxreason import config as cfg
from jaxreason.checkpoint import write_json
from jaxreason.curate import traces
from jaxreason.curate.overlap import Contamination
from jaxreason.curate.select import Kept, Selection, messages_of, select
from jaxreason.curate.traces import Trace
from jaxreason.data.prompts import Prompt, load_prompts
from jaxreason.data.sources import splits_itself
from jaxreason.errors import UserError
from jaxreason.evaluate.exam import open_exam
from jaxreason.evaluate.records import Records
from jaxreason.locks import Owner
from jaxreason.serve import Opened, open_model
from jaxreason.terminal import console, show_table

ROWS, REPORT = "rows.jsonl", "report.json"
_GENERATED = 10_000  # problems of an evaluation set that a program writes without end
_ALL = 2**31 - 1
_DIGEST_CHARS = 16
_TWICE = "the same prompt as an earlier row"


@dataclasses.dataclass(frozen=True)
class BuildJob:
    """What build_data.py is asked for."""

    model: str
    source: str  # problems with known answers
    samples: int  # traces of a problem
    out: Path  # a folder
    options: cfg.Build


def build(job: BuildJob) -> dict[str, Any]:
    """Draws what the folder lacks, selects, and writes rows.jsonl and report.json; returns the report, which is printed.

    Raises UserError where nothing is kept (the report is written all the same), where another process writes the folder,
    and for what cannot be read.
    """
    way = traces.way_of(job.options, job.samples)
    with owned(job.out):
        return _build(job, way)


@contextlib.contextmanager
def owned(out: Path) -> Iterator[None]:
    """The folder is made, and is this process's own meanwhile. Raises UserError for a file, and where it is another's."""
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder, in which {ROWS} and {REPORT} are written")
    out.mkdir(parents=True, exist_ok=True)
    owner = Owner(out, fix="give another folder (--out)")
    try:
        yield
    finally:
        owner.release()


def _build(job: BuildJob, way: traces.Way) -> dict[str, Any]:
    opened = open_model(job.model, job.options)
    seen = evaluation_sets(job.options, opened)
    found, rows_dropped = _prompts(job, opened)
    records = Records(job.out, Trace, traces.FILE)
    settings = traces.settings_of(way, job.options.seed, opened.identity)
    known = sum(records.find(settings, problem, way.samples) is not None for problem in found)
    console.print(f"{job.source}: {len(found)} prompts, {way.samples} traces each; {known} drawn before", markup=False)
    if known < len(found):
        traces.draw(found, opened.load().model(job.options), way, records, settings)
        opened.sampler.release()
    drawn = {problem: records.find(settings, problem, way.samples) or [] for problem in found}
    selection = select(found, drawn, job.options, opened.chat(job.options), seen)
    report = _report(job, selection, len(found), rows_dropped)
    write_json(job.out / REPORT, report)
    _show(report, job.out)
    if not selection.kept:
        reason, count = max(selection.dropped.items(), key=lambda entry: entry[1])
        raise UserError(
            f"none of {selection.drawn} traces was kept; {count} of them: {reason}; see {job.out / REPORT}, and change that "
            "filter or the model"
        )
    origin = _origin(job, opened)
    write_rows(job.out, [_row(kept, origin) for kept in selection.kept])
    return report


def _prompts(job: BuildJob, opened: Opened) -> tuple[dict[str, Prompt], dict[str, int]]:
    """Prompts by digest, and why rows are none. Raises UserError where no row is usable."""
    options = job.options
    data = cfg.Problems(
        source=job.source, split=options.split, row_schema=options.row_schema, max_rows=options.max_rows,
        keep_columns=options.keep_columns, system_prompt=options.system_prompt, template=options.template,
    )  # fmt: skip
    chat, most = opened.chat(options), options.max_prompt_tokens
    loaded = load_prompts(data, opened.tokenizer, options.seed, max_prompt_tokens=most, chat=chat)
    dropped, found = collections.Counter(loaded.dropped), dict[str, Prompt]()
    for prompt in loaded.prompts:
        if found.setdefault(traces.problem_of(prompt), prompt) is not prompt:
            dropped[_TWICE] += 1
    return found, dict(dropped)


def evaluation_sets(options: cfg.Curate, opened: Opened) -> Contamination:
    """The problems that ``against`` names. Raises UserError for a set that cannot be read."""
    questions: list[str] = []
    for word in options.against:
        task = cfg.Task(problems=_GENERATED if splits_itself(word) else _ALL)
        try:
            exam = open_exam(word, task, opened.chat(options), opened.tokenizer)
        except UserError as error:
            raise UserError(f"against={word}: {error}") from None
        questions += [item.question for item in exam.items]
    return Contamination(questions, options.ngram)


def _report(job: BuildJob, selection: Selection, prompts: int, rows_dropped: dict[str, int]) -> dict[str, Any]:
    """Counts of prompts and traces; reasons in the order of their numbers."""
    dropped = dict(sorted(selection.dropped.items(), key=lambda entry: -entry[1]))
    return {
        "model": job.model, "source": job.source, "samples": job.samples, "prompts": prompts, "rows_dropped": rows_dropped,
        "drawn": selection.drawn, "kept": len(selection.kept),
        "prompts_kept": len({kept.trace.problem for kept in selection.kept}), "dropped": dropped,
        "options": job.options.model_dump(mode="json"),
    }  # fmt: skip


def _show(report: dict[str, Any], out: Path) -> None:
    lines: list[tuple[str, object]] = [("prompts", report["prompts"]), ("traces drawn", report["drawn"])]
    lines += [("traces kept", report["kept"]), ("prompts with a kept trace", report["prompts_kept"])]
    lines += [(f"traces left out: {reason}", count) for reason, count in report["dropped"].items()]
    lines += [(f"rows left out: {reason}", count) for reason, count in report["rows_dropped"].items()]
    show_table(str(out), lines)


def _origin(job: BuildJob, opened: Opened) -> dict[str, Any]:
    """Columns that all rows share."""
    options = job.options
    return maker(opened) | {
        "source": job.source, "split": options.split, "seed": options.seed, "temperature": options.temperature,
    }  # fmt: skip


def maker(opened: Opened) -> dict[str, Any]:
    """Columns that say which weights wrote a row."""
    source = opened.source
    step = int(source.path.name) if source.kind == "checkpoint" else None
    return {"model": str(source.path), "weights": source.digest()[:_DIGEST_CHARS], "step": step}


def _row(kept: Kept, origin: dict[str, Any]) -> dict[str, Any]:
    prompt, trace = kept.prompt, kept.trace
    return {
        "messages": messages_of(prompt, trace), "gold": prompt.gold, **origin, "row": prompt.index, "sample": trace.sample,
        "rewards": trace.rewards, "reward": trace.reward, "pass_rate": kept.pass_rate, "tokens": trace.tokens,
    }  # fmt: skip


def write_rows(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows.jsonl atomically, and only if it is another: who reads it by its time of change is not misled."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path, content = out / ROWS, "".join(lines).encode("utf-8", "replace")
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
