"""On-policy distillation beside SFT on a teacher's samples: the same student, prompts, number of samples and updates.

    python scripts/train.py --config sft && python scripts/train.py --config grpo      # the teacher, in runs/grpo
    python benchmarks/distillation.py --teacher runs/grpo [--seeds 3] [--json OUT]

Each seed trains a student of its own for a while (``--student-steps`` of --config sft), and from there each arm takes
``--steps`` updates of ``--batch`` sequences, every prompt once:

- ``sft``: the teacher's completions at temperature 1, one epoch of NLL;
- ``sft right``: as many prompts, those completions alone that are right;
- ``on-policy``: the student's own completions, ``configs/distill/on_policy.yaml``;
- ``gkd``: half of each, ``configs/distill/gkd.yaml``.

An arm's learning rate is the one of ``--rates`` that is best for the first seed, whose problems the others share. The table has
the greedy accuracy on held-out problems, the mean over seeds, and the difference from ``sft`` with its 95 % interval.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax

from jaxreason import config as cfg
from jaxreason.compare import stats
from jaxreason.data.prompts import load_prompts
from jaxreason.data.tokenizer import load
from jaxreason.evaluate.accuracy import sample_of
from jaxreason.rewards import get
from jaxreason.sampler import EngineSampler, Job, Sampling
from jaxreason.sharding import make_mesh
from jaxreason.terminal import console, show_table
from jaxreason.weights import locate

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 128


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="runs/grpo", help="a run, or a model directory with the embedded vocabulary")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--student-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--dir", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    return parser.parse_args()


def teach(teacher: str, seed: int, count: int, path: Path) -> dict[str, Path]:
    """The teacher's completions of ``count`` training prompts as rows of SFT, all of them and the right ones."""
    source, mesh = locate(teacher), make_mesh(cfg.Mesh())
    model = source.config("float32", "float32")
    tokenizer = load(source.tokenizer)
    data = cfg.load("grpo", ["data.max_rows=4000"]).data
    prompts = load_prompts(data, tokenizer, seed).prompts[:count]
    sampler = EngineSampler(model, tokenizer.stop_ids, mesh)
    sampler.load(source.params(model, mesh), 0)
    job = Job(Sampling(temperature=1.0, max_completion_tokens=LIMIT), seed=seed, slots=64)
    grader = get("accuracy", symbolic="never")
    found: dict[str, list[dict]] = {"sft": [], "sft right": []}
    for done in sampler.generate([p.ids for p in prompts], job):
        prompt, sample = prompts[done.prompt_index], sample_of(prompts[done.prompt_index], done, tokenizer, LIMIT)
        if done.truncated or not sample.completion.strip():
            continue
        turns = [{"role": "user", "content": prompt.user}, {"role": "assistant", "content": sample.completion}]
        found["sft"].append({"messages": turns})
        if grader.function(sample, **grader.options) == 1:
            found["sft right"].append({"messages": turns})
    paths = {name: path / f"{name.replace(' ', '-')}-{seed}.jsonl" for name in found}
    for name, rows in found.items():
        paths[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths


def run(words: list[str], folder: Path) -> dict:
    """Trains, and returns the run's summary."""
    if not (folder / "summary.json").is_file():
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *words]
        where = [f"run.name={folder.name}", f"run.dir={folder.parent}"]
        subprocess.run([*command, *where], check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text())


def arms(args: argparse.Namespace, student: Path, seed: int) -> dict[str, list[str]]:
    """The words of every arm's run from ``student``, without the learning rate."""
    start = [f"model.weights={student}", f"run.seed={seed}", "optimizer.schedule=constant", "optimizer.warmup_steps=5"]
    sft = [
        "--config", "sft", "model.preset=null", "data.packing=false", f"data.batch_size={args.batch}", "data.eval_rows=0",
        "train.steps=null", "train.epochs=1", "data.eval_source=embedded:arithmetic", "optimizer.weight_decay=0", *start,
    ]  # fmt: skip
    taught = teach(args.teacher, seed, args.steps * args.batch, args.dir)
    found = {name: [*sft, f"data.source={path}"] for name, path in taught.items()}
    policy = [f"train.steps={args.steps}", f"rollout.prompts_per_step={args.batch}", f"teacher.weights={args.teacher}", *start]
    return found | {name: ["--config", f"distill/{name.replace('-', '_')}", *policy] for name in ("on-policy", "gkd")}


def best(args: argparse.Namespace, words: list[str], name: str, rate: float | None) -> tuple[stats.Rate, dict[float, float]]:
    """The accuracy of an arm at its learning rate, or at the best of all; and those of all that were tried."""
    rates = args.rates if rate is None else [rate]
    found = {
        rate: run([*words, f"optimizer.learning_rate={rate}"], args.dir / f"{name}-{rate:g}")["eval_accuracy"] for rate in rates
    }
    return stats.Rate(max(found.values()), args.problems), found


def main() -> int:
    args = parse()
    args.dir.mkdir(parents=True, exist_ok=True)
    graded = [f"eval.problems={args.problems}", "train.save_every=0", "train.eval_every=0"]
    results: dict[str, dict[int, stats.Rate]] = {"student": {}, "sft": {}, "sft right": {}, "on-policy": {}, "gkd": {}}
    chosen: dict[str, float] = {}
    clock = time.monotonic()
    for seed in range(args.seeds):
        student = args.dir / f"student-{seed}"
        words = ["--config", "sft", f"train.steps={args.student_steps}", "data.eval_rows=0", f"run.seed={seed}", *graded]
        results["student"][seed] = stats.Rate(run(words, student)["eval_accuracy"], args.problems)
        for name, words in arms(args, student, seed).items():
            results[name][seed], found = best(args, [*words, *graded], f"{name.replace(' ', '-')}-{seed}", chosen.get(name))
            chosen[name] = max(found, key=found.__getitem__)
            console.print(f"seed {seed}, {name}: {found}")
    report(args, results, chosen, time.monotonic() - clock)
    return 0


def report(args: argparse.Namespace, results: dict, chosen: dict[str, float], seconds: float) -> None:
    """Prints the table and writes the figures."""
    rows, figures = [], {**vars(args), "seconds": seconds, "device": jax.devices()[0].device_kind, "rates": chosen}
    for name, rates in results.items():
        mean, gain = stats.accuracy(list(rates.values())), stats.accuracy_difference(rates, results["sft"])
        figures[name] = {"accuracy": [r.value for r in rates.values()], "mean": mean.mean, "low": mean.low, "high": mean.high}
        said = f"{mean.mean:.1%}" + (f" ({mean.low:.1%} to {mean.high:.1%})" if mean.low is not None else "")
        if name != "sft" and gain is not None and gain.low is not None:
            figures[name] |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
            said += f", less sft {gain.mean:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"
        rows.append((name, said + (f", lr {chosen[name]:g}" if name in chosen else "")))
    show_table(f"{args.steps} updates of {args.batch} sequences, {args.seeds} seeds", rows)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
