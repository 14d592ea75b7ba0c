"""Seconds of one GRPO step and completion tokens/s: jaxreason against TRL's GRPOTrainer with transformers ``generate``.

    pip install -e '.[bench]'
    python benchmarks/grpo_step.py [--prompts 4] [--group 8] [--tokens 64] [--steps 6] [--rounds 2] [--json OUT]

Both load one 7M-parameter checkpoint and read the same prompts in the same order; both train one update a rollout with
all sequences in one microbatch, in float32, at temperature 1, beta 0, AdamW and a global-norm clip of 1. The reward is
the share of digits. jaxreason runs its own loop, ``grpo.train``, with its grading processes and the packing of its
batches; TRL runs its own too, without activation checkpointing, which it defaults to. Each side runs in a process of
its own, by turns; a round's first steps (compilation, allocation) are not counted.

Every completion has exactly ``--tokens`` tokens, on either side without an option: the weights are random but for one
channel of the tied embeddings, 2 for all tokens and −2 for the stop tokens. Its sign survives the layers, so at every
drawn position the stop tokens' logits are tens below the others'. Lengths are checked, not assumed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import answer, by_turns, random_llama, step_clock

SHAPE = (384, 256, 896, 8, 8, 4, 32)  # vocabulary (the embedded tokenizer's), width, mlp, layers, heads, kv heads, head dim
WARM = 2
RATE = 1e-6


def digit_share(text: str) -> float:
    return sum(c.isdigit() for c in text) / max(1, len(text))


def reward(sample) -> float:
    """jaxreason's side of it."""
    return digit_share(sample.completion)


def rewards(completions: list[str], **_) -> list[float]:
    """TRL's."""
    return [digit_share(text) for text in completions]


def make_checkpoint(path: Path) -> None:
    """Weights that never stop, and the embedded tokenizer beside them."""
    import torch

    from jaxreason.data.tokenizer import load

    tokenizer = load("embedded")
    stops = list(tokenizer.stop_ids)
    model = random_llama(
        *SHAPE, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.hf.eos_token_id, pad_token_id=tokenizer.pad_id
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.model.embed_tokens.weight[stops, 0] = -2.0
    model.generation_config.eos_token_id = stops
    model.save_pretrained(path)
    tokenizer.save(path)


def settings(args, out: str):
    """The run, whose prompts both sides read."""
    from jaxreason import config as cfg

    return cfg.build({
        "algorithm": "grpo",
        "run": {"name": "benchmark", "dir": out},
        "model": {"weights": args.checkpoint, "compute_dtype": "float32"},
        "data": {"source": "embedded:arithmetic", "max_rows": args.prompts * (WARM + args.steps), "shuffle": False},
        "rollout": {
            "prompts_per_step": args.prompts, "group_size": args.group, "max_completion_tokens": args.tokens,
            "slots": args.prompts * args.group,
        },
        "reward": {"functions": [{"name": f"{Path(__file__).resolve()}:reward"}]},
        "optimizer": {"learning_rate": RATE, "schedule": "constant"},
        "train": {"steps": WARM + args.steps, "microbatch_size": args.prompts * args.group},
    })  # fmt: skip


def run_jaxreason(args) -> dict[str, list[float]]:
    from jaxreason import xla
    from jaxreason.rl import grpo

    xla.start_with_huge_pages()  # as the commands do
    with tempfile.TemporaryDirectory() as out:
        grpo.train(settings(args, out))
        steps = [json.loads(line) for line in Path(out, "benchmark", "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [s["seconds"] for s in steps],
        "rollout": [s["seconds_rollout"] for s in steps],
        "reward": [s["seconds_reward"] for s in steps],
        "tokens": [s["completion_tokens"] for s in steps],
        "mean reward": [s["reward"] for s in steps],
    }


def run_trl(args) -> dict[str, list[float]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from jaxreason.data.prompts import load_prompts
    from jaxreason.data.tokenizer import load

    seconds, rollout, reward = [], [], []

    def timed(method, kept: list[float]):
        def call(self, *words):
            begin = time.perf_counter()
            result = method(self, *words)
            kept.append(time.perf_counter() - begin)
            return result

        return call

    class Timed(GRPOTrainer):
        _generate = timed(GRPOTrainer._generate, rollout)
        _calculate_rewards = timed(GRPOTrainer._calculate_rewards, reward)

    with tempfile.TemporaryDirectory() as out:
        prompts = load_prompts(settings(args, out).data, load(args.checkpoint), 0).prompts
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        if any(tokenizer(p.text)["input_ids"] != list(p.ids) for p in prompts):
            raise RuntimeError("the sides would see different prompt tokens")
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=args.prompts * args.group, num_generations=args.group,
            max_completion_length=args.tokens, max_steps=WARM + args.steps, temperature=1.0, beta=0.0, num_iterations=1,
            loss_type="grpo", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch",
            use_vllm=False, shuffle_dataset=False, bf16=False, fp16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32), args=config,
            reward_funcs=rewards, train_dataset=Dataset.from_dict({"prompt": [p.text for p in prompts]}),
            processing_class=tokenizer, callbacks=[step_clock(seconds)],
        )  # fmt: skip
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "seconds": seconds,
        "rollout": rollout,
        "reward": reward,
        "tokens": [entry["completions/mean_length"] for entry in log],
        "mean reward": [entry["reward"] for entry in log],
    }


SIDES = {"jaxreason": run_jaxreason, "trl": run_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--steps", type=int, default=6, help="counted, of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        answer(lambda: SIDES[args.side](args))
        return
    with tempfile.TemporaryDirectory() as path:
        make_checkpoint(Path(path))
        words = [f"--{n}={getattr(args, n)}" for n in ("prompts", "group", "tokens", "steps")]
        found = by_turns(__file__, SIDES, args.rounds, [*words, "--checkpoint", path])
    report(args, {side: join(results) for side, results in found.items()})


def join(results: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The counted steps of all rounds; ``update`` is what rollout and reward leave of a step."""
    found = {name: [x for result in results for x in result[name][WARM:]] for name in results[0]}
    parts = zip(found["seconds"], found["rollout"], found["reward"])
    return found | {"update": [seconds - rollout - reward for seconds, rollout, reward in parts]}


def report(args, found: dict[str, dict[str, list[float]]]) -> None:
    for side, values in found.items():
        if set(values["tokens"]) != {args.tokens}:
            sys.exit(f"{side}: mean completion lengths are {values['tokens']}, not {args.tokens}: nothing is compared")
    drawn, counted = args.prompts * args.group * args.tokens, len(found["trl"]["seconds"])
    median = {side: {name: float(np.median(x)) for name, x in values.items()} for side, values in found.items()}
    rate = {side: drawn / values["seconds"] for side, values in median.items()}
    print(f"{args.prompts} prompts x {args.group} completions x {args.tokens} tokens, medians of {counted} steps")
    print(f"{'':10}{'s/step':>9}{'best':>9}{'tokens/s':>10}{'rollout s':>11}{'reward s':>10}{'update s':>10}{'reward':>9}")
    for side, m in median.items():
        print(
            f"{side:10}{m['seconds']:9.3f}{min(found[side]['seconds']):9.3f}{rate[side]:10.0f}{m['rollout']:11.3f}"
            f"{m['reward']:10.4f}{m['update']:10.3f}{m['mean reward']:9.4f}"
        )
    print(f"{'ratio':10}{rate['jaxreason'] / rate['trl']:28.2f}")
    if args.json:
        shape = {name: getattr(args, name) for name in ("prompts", "group", "tokens", "steps", "rounds")}
        Path(args.json).write_text(json.dumps({"shape": shape, "tokens_per_second": rate, "steps": found}, indent=1))


if __name__ == "__main__":
    main()
