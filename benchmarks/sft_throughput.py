"""Tokens per second of one SFT step: jaxreason against TRL's SFTTrainer, same weights, shapes and cores, in one run.

    pip install -e '.[bench]'
    python benchmarks/sft_throughput.py [--model 1m|135m] [--rows 32] [--length 256] [--steps 8] [--rounds 2] [--json OUT]

Each side runs in a process of its own, by turns, so that neither keeps the other's threads or memory; a round's first
steps (compilation, allocation) are not counted. Both train full rows in float32 with AdamW and a global-norm clip of 1.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from common import answer, by_turns, random_llama, step_clock

SHAPES = {
    # vocabulary, width, mlp, layers, heads, kv heads, head dim, default batch
    "1m": (512, 128, 384, 4, 4, 2, 32, 32, 256),
    "135m": (49152, 576, 1536, 30, 9, 3, 64, 2, 512),
}
WARM = 2


def rows(args) -> np.ndarray:
    return np.random.default_rng(0).integers(5, SHAPES[args.model][0], (args.rows, args.length))


def run_jaxreason(args) -> list[float]:
    import jax
    import jax.numpy as jnp

    from jaxreason import config as cfg
    from jaxreason import hf, losses, xla
    from jaxreason.sharding import make_mesh
    from jaxreason.train import optimizer as opt
    from jaxreason.train import state as states
    from jaxreason.train.step import make_train_step
    from jaxreason.types import Batch

    xla.start_with_huge_pages()  # as the commands do
    params, config = hf.load(args.checkpoint)
    config = config.replace(remat=cfg.Model.model_fields["remat"].default)
    settings = cfg.Optimizer(learning_rate=1e-5, schedule="constant")
    mesh = make_mesh(cfg.Mesh())
    optimizer = opt.make(settings, 100)
    state = states.adopt(params, config, optimizer, mesh)
    step = jax.jit(make_train_step(config, losses.get("nll"), optimizer, opt.schedule(settings, 100), 1), donate_argnums=0)
    tokens = jnp.asarray(rows(args), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(args.length), tokens.shape)
    mask = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), positions, jnp.ones_like(tokens), mask)
    seconds = []
    for _ in range(WARM + args.steps):
        clock = time.perf_counter()
        state, metrics, _ = step(state, batch)
        metrics = jax.device_get(metrics)
        seconds.append(time.perf_counter() - clock)
    return [*seconds[WARM:], float(metrics["loss"])]


def run_trl(args) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    data = rows(args)
    dataset = Dataset.from_dict({"input_ids": [list(map(int, r)) for r in data] * (WARM + args.steps)})
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, per_device_train_batch_size=args.rows, max_steps=WARM + args.steps, learning_rate=1e-5,
            lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch", max_length=args.length, packing=False,
            bf16=False, fp16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1,
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
        clock = step_clock(seconds)
        trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])
        trainer.train()
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    return [*seconds[WARM:], float(loss)]


SIDES = {"jaxreason": run_jaxreason, "trl": run_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="1m")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows, args.length = args.rows or SHAPES[args.model][-2], args.length or SHAPES[args.model][-1]
    if args.side:
        answer(lambda: SIDES[args.side](args))
        return
    with tempfile.TemporaryDirectory() as path:
        random_llama(*SHAPES[args.model][:-2], bos_token_id=1, eos_token_id=2).save_pretrained(path)
        words = [f"--{n}={getattr(args, n)}" for n in ("model", "rows", "length", "steps")]
        results = by_turns(__file__, SIDES, args.rounds, [*words, "--checkpoint", path])
    found = {side: [s for *seconds, _ in rounds for s in seconds] for side, rounds in results.items()}
    loss = {side: rounds[-1][-1] for side, rounds in results.items()}
    tokens = args.rows * args.length
    rate = {side: tokens / float(np.median(seconds)) for side, seconds in found.items()}
    print(f"{args.model}: {args.rows} rows x {args.length} tokens, median of {len(found['trl'])} steps")
    for side in found:
        best = tokens / min(found[side])
        print(f"  {side:10s} {rate[side]:9.0f} tokens/s  (best step {best:.0f})  last loss {loss[side]:.4f}")
    print(f"  ratio      {rate['jaxreason'] / rate['trl']:9.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"shape": vars(args), "tokens_per_second": rate, "seconds": found}, indent=1))


if __name__ == "__main__":
    main()
