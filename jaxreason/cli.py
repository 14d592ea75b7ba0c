"""The commands: parse, call one function, print.

Exit status: those of :mod:`jaxreason.command`, and 75 where a run was told to stop, saved and has steps left
(:data:`STOPPED`).
"""

import argparse
import json
import os
import sys

from jaxreason import config as cfg
from jaxreason import distributed
from jaxreason.command import command, told
from jaxreason.errors import UserError
from jaxreason.paths import expanded, local

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on


def _start(
    args: argparse.Namespace, deterministic: bool = False, cluster: distributed.Cluster | None = None, timeout_s: float = 300
) -> None:
    """XLA's settings and the other processes, before the first device is touched. Raises UserError."""
    from jaxreason import xla
    from jaxreason.terminal import console

    platform = xla.detect()
    if platform == "cpu" and args.own_process:
        xla.start_with_huge_pages()
    xla.leave_out_absent_gpu()
    chosen = xla.configure(platform, distributed.devices(cluster), deterministic)
    console.quiet = cluster is not None and cluster.process > 0  # one process speaks; errors come from every one
    distributed.start(cluster, timeout_s)
    if cluster:
        console.print(f"{cluster.processes or 'several'} processes ({cluster.found})")
    if platform == "gpu":
        console.print(" ".join(f"{name}={value}" for name, value in chosen.items()), markup=False)


def _train_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a name below configs/ (sft, llama3.2-3b/sft) or a YAML file")
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "--control", action="store_true", help="GRPO: reward the format alone, as NAME-control: what a gain is measured against"
    )
    several = parser.add_argument_group("several processes", "where no launcher says it: see docs/hosts.md")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="K", help="0 to N - 1")
    several.add_argument("--connect-timeout", type=float, default=300, metavar="S", help="seconds until all have met")
    parser.add_argument("--dry-run", action="store_true", help="prepare data, compile, show everything; train nothing")
    parser.add_argument("--no-report", action="store_true", help="write no RUN/report.html at the end")


@command(_train_words)
def train(args: argparse.Namespace) -> int | None:
    """Trains what a config says: SFT or GRPO. A run that finds its own checkpoint resumes."""
    config = cfg.load(args.config, args.words)
    if args.control:
        config = cfg.control(config)
    if args.print_config:
        print(cfg.dump(config), end="")
        return None
    cluster = distributed.detect(args.coordinator, args.num_processes, args.process_id)
    with distributed.joined(cluster):
        _start(args, config.run.deterministic, cluster, args.connect_timeout)
        if isinstance(config, cfg.SftConfig):
            from jaxreason.train import sft

            summary = sft.train(config, args.dry_run)
        else:
            from jaxreason.rl import grpo

            summary = grpo.train(config, args.dry_run)
    if summary is None:
        return None if args.dry_run else STOPPED
    if cluster is None or cluster.process == 0:
        from jaxreason.report import end

        end.show(f"{config.run.dir}/{config.run.name}", told, page=not args.no_report)
    return None


def _convert_words(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True)
    out = verbs.add_parser("to-hf", help="a run or checkpoint to a directory that transformers opens")
    out.add_argument("model", metavar="RUN|CHECKPOINT")
    out.add_argument("out", metavar="OUT")
    out.add_argument(
        "--dtype", default=None, choices=["bfloat16", "float32"], help="default: that of the weights that training began with"
    )
    adapters = verbs.add_parser("to-peft", help="the adapters of a run with lora.rank to a directory that PEFT opens")
    adapters.add_argument("model", metavar="RUN|CHECKPOINT")
    adapters.add_argument("out", metavar="OUT")
    gguf = verbs.add_parser("to-gguf", help="a model with the embedded tokenizer to a file that llama.cpp opens")
    gguf.add_argument("model", metavar="RUN|CHECKPOINT|HF_DIR")
    gguf.add_argument("out", metavar="FILE")
    back = verbs.add_parser("from-hf", help="a Hugging Face directory or hub id to a checkpoint")
    back.add_argument("model", metavar="DIR|HUB_ID")
    back.add_argument("out", metavar="OUT")


@command(_convert_words)
def convert(args: argparse.Namespace) -> None:
    """Converts between this project's checkpoints and Hugging Face directories."""
    # Work for the host: a GPU may be busy training, and has less memory.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxreason import convert as work

    if args.verb == "to-hf":
        print(work.to_hf(args.model, args.out, args.dtype))
    else:
        verb = {"to-peft": work.to_peft, "to-gguf": work.to_gguf, "from-hf": work.from_hf}[args.verb]
        print(verb(args.model, args.out))


_STRATEGIES = "direct, cot, self_consistency, best_of_n, budget, tot_bfs, tot_dfs, or package.module:function"


def _generate_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="RUN|CHECKPOINT|HF_DIR")
    parser.add_argument("--prompt", help="the user's message; - reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="a conversation, which keeps its turns: /reset, /exit or Ctrl-D")
    parser.add_argument("--strategy", metavar="NAME[@option=value]", help=f"search for the answer: {_STRATEGIES}")
    parser.add_argument("--out", metavar="FILE", help="with --strategy: its tree, votes or scores as JSON")
    parser.add_argument("words", nargs="*", metavar="key=value", help=", ".join(cfg.keys(cfg.Decode)))


@command(_generate_words)
def generate(args: argparse.Namespace) -> None:
    """Answers a prompt, or holds a conversation, streaming the text."""
    options = cfg.parse_words(cfg.Decode, args.words)
    if args.chat and (other := next((name for name in ("prompt", "strategy", "out") if getattr(args, name) is not None), None)):
        raise UserError(f"--chat asks for the messages and draws each answer once; leave --{other} out")
    if not args.chat and args.prompt is None:
        raise UserError("give --prompt TEXT, or --chat for a conversation")
    if args.out and not args.strategy:
        raise UserError("--out writes what a strategy found; add --strategy, e.g. --strategy tot_bfs")
    _start(args)
    message = sys.stdin.read() if args.prompt == "-" else args.prompt
    from jaxreason import serve

    if args.chat:
        serve.converse(args.model, options)
    elif args.strategy:
        serve.search(args.model, message, args.strategy, options, local(args.out, "--out") if args.out else None)
    else:
        serve.answer(args.model, message, options)


def _evaluate_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, action="append", metavar="RUN|CHECKPOINT|HF_DIR", help="may be repeated")
    parser.add_argument(
        "--task", required=True, action="append", metavar="NAME|NAME=PATH|SOURCE",
        help="a benchmark by name (docs/evaluation.md) or a local copy of it, embedded:NAME, reasoning-gym:NAME, a file or "
        "directory of problems, or a hub id; may be repeated",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=1, help="completions a problem; above 1 set temperature")
    parser.add_argument("--strategy", action="append", metavar="NAME[@option=value]", help=f"may be repeated: {_STRATEGIES}")
    parser.add_argument("--out", metavar="FOLDER", help="keep answers here: the same command goes on where it stopped")
    parser.add_argument("words", nargs="*", metavar="key=value", help=", ".join(cfg.keys(cfg.Task)))


@command(_evaluate_words)
def evaluate(args: argparse.Namespace) -> None:
    """Accuracy of models on problems with known answers, with intervals; several are compared problem by problem."""
    options = cfg.parse_words(cfg.Task, args.words)
    if args.samples < 1:
        raise UserError(f"--samples is {args.samples}; it is 1 or more")
    if args.samples > 1 and options.temperature == 0:
        raise UserError(f"--samples {args.samples} of greedy decoding are all the same; set e.g. temperature=0.6")
    out = local(args.out, "--out") if args.out else None
    _start(args)
    from jaxreason import serve
    from jaxreason.evaluate import strategies

    chosen = [strategies.get(word) for word in args.strategy] if args.strategy else [None]
    serve.measure(serve.Contest(args.model, args.task, chosen, args.samples, options, out))


def _build_data_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="RUN|CHECKPOINT|HF_DIR")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--source", help="problems with known answers: what data.source takes")
    rows.add_argument("--seeds", metavar="FILE", help="tasks that the model makes new ones after (Self-Instruct)")
    parser.add_argument("--samples", type=int, help="with --source: traces of a prompt (8)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the same command goes on where it stopped")
    known = f"{', '.join(cfg.keys(cfg.Build))}; with --seeds: {', '.join(cfg.keys(cfg.Instruct))}"
    parser.add_argument("words", nargs="*", metavar="key=value", help=known)


@command(_build_data_words)
def build_data(args: argparse.Namespace) -> None:
    """Draws traces of problems, or new tasks after seed tasks, and writes what passes the filters as rows for SFT."""
    out = local(args.out, "--out")
    if args.seeds is not None:
        if args.samples is not None:
            raise UserError("--samples goes with --source; with --seeds, instances=N is the most of a new instruction")
        told = cfg.parse_words(cfg.Instruct, args.words)
        _start(args)
        from jaxreason.curate.instruct import InstructJob, instruct

        instruct(InstructJob(args.model, args.seeds, out, told))
        return
    options, samples = cfg.parse_words(cfg.Build, args.words), 8 if args.samples is None else args.samples
    if samples < 1:
        raise UserError(f"--samples is {samples}; it is 1 or more")
    _start(args)
    from jaxreason.curate.rows import BuildJob, build

    build(BuildJob(args.model, args.source, samples, out, options))


def _pipeline_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a name below configs/pipeline/ (r1) or a YAML file")
    parser.add_argument("words", nargs="*", metavar="key=value", help="dir=FOLDER, seed=N; STAGE.key=value: of a stage's config")


@command(_pipeline_words)
def pipeline(args: argparse.Namespace) -> int | None:
    """Runs the stages of a pipeline, such as DeepSeek-R1's. The same command goes on where it stopped."""
    plan, configs = cfg.load_pipeline(args.config, args.words)
    _start(args)
    from jaxreason.pipeline import run

    return None if run(plan, configs) is not None else STOPPED


def _compare_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="a name below configs/ (grpo, sft) or a YAML file")
    parser.add_argument(
        "--losses", metavar="LOSS,LOSS", help="names or my_file.py:my_loss; LOSS@key=value@key=value sets its options"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each loss, with seeds from run.seed on")
    parser.add_argument("--offline", action="store_true", help="train nothing: gradients on one recorded rollout")
    parser.add_argument("--report-only", nargs="+", metavar="RUN", help="train nothing: report on runs that exist")
    parser.add_argument("--out", help="folder of the runs and report.html; default: RUN.DIR/RUN.NAME-compare")
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the config, for every loss")


@command(_compare_words)
def compare(args: argparse.Namespace) -> None:
    """Trains losses from the same start on the same prompts and seeds, and writes one HTML report."""
    if args.report_only and (args.config or args.losses or args.words or args.offline):
        raise UserError("--report-only RUN [RUN ...] goes with --out alone")
    if not args.report_only and not (args.config and args.losses):
        raise UserError("give --config NAME and --losses LOSS,LOSS, or --report-only RUN [RUN ...]")
    from jaxreason import compare as work
    from jaxreason import xla

    if args.report_only:
        xla.leave_out_absent_gpu()
        runs = [expanded(run) for run in args.report_only]
        work.finish(local(args.out, "--out") if args.out else runs[0].parent, runs, args.given)
        return
    entries = work.entries_of(args.config, args.losses.split(","), args.seeds, args.words, args.out)
    _start(args, entries[0].config.run.deterministic)
    (work.offline if args.offline else work.train)(entries, args.given)


def _report_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the folder of a run, finished or not, or of a finished pipeline")
    parser.add_argument("other", nargs="?", help="a second run, shown beside it, with the config keys that differ")
    told = "also draw what generate.py --strategy tot_bfs --out FILE wrote, or the first trees of an evaluation's answers.jsonl"
    parser.add_argument("--tree", metavar="FILE", help=told)
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html")


@command(_report_words)
def report(args: argparse.Namespace) -> None:
    """Writes one HTML page about a run, or about two beside each other, from the files that they wrote."""
    from jaxreason.report import pipeline as of_pipeline
    from jaxreason.report.run import write_run_report

    folder = local(args.run)
    if (folder / of_pipeline.FILE).is_file():
        if args.other or args.out or args.tree:
            raise UserError(f"{args.run} is a pipeline, whose page is written into it: give no other run, --out or --tree")
        print(f"report: {of_pipeline.write_pipeline_report(folder, of_pipeline.read_stages(folder))}")
        return
    other, out, tree = (local(path) if path else None for path in (args.other, args.out, args.tree))
    print(f"report: {write_run_report(folder, other, out, tree)}")


def _replay_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run that kept such a batch")
    parser.add_argument("--update", type=int, metavar="N", help="optimizer update of the batch; default: the newest kept")


@command(_replay_words)
def replay(args: argparse.Namespace) -> None:
    """Runs a step again whose loss or gradient was not finite: loss, gradient norms, and the rows it comes from."""
    _start(args)
    from jaxreason.replay import replay as work

    work(args.run, args.update)


def _plan_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a name below configs/ (llama3.2-3b/sft) or a YAML file")
    parser.add_argument("--target", default="h100", help="a GPU of jaxreason/targets/: a100, b200, h100, h200, rtx3060, rtx4090")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs of one host")
    parser.add_argument("--hosts", type=int, default=1, metavar="M")
    parser.add_argument("--price", type=float, help="USD for a GPU hour; default: an assumption in the target's file")
    parser.add_argument("--document-tokens", type=int, help="mean tokens of an example; default: the longest allowed")
    parser.add_argument("--examples", type=int, help="examples of an epoch; default: data.max_rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the config")


@command(_plan_words)
def plan(args: argparse.Namespace) -> None:
    """Compiles what a config will run for GPUs that are not here, and reports memory, speed and cost."""
    # The compiler must not look for a GPU, and its warnings about finding none are not the user's.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    from jaxreason.plan import Options
    from jaxreason.plan import plan as make_plan

    options = Options(args.target, args.hosts, args.devices, args.price, args.document_tokens, args.examples)
    report = make_plan(args.config, args.words, options)
    if args.json:
        print(json.dumps(report))
        return
    from rich.console import Console

    from jaxreason.plan.table import show

    show(report, Console(highlight=False))


COMMANDS = {
    "train": train, "generate": generate, "evaluate": evaluate, "build-data": build_data, "pipeline": pipeline,
    "convert": convert, "plan": plan, "compare": compare, "report": report, "replay": replay,
}  # fmt: skip
