"""Decoding speed of the rollout engine beside transformers ``generate``, on the same random weights.

    python benchmarks/decode.py                       # SmolLM2-135M's shape, 16 prompts of 32 tokens, 64 new tokens
    python benchmarks/decode.py --preset embedded-tiny --batch 32 --json OUT

Both decode greedily and never stop early. The two take turns within one process, so that other load on the machine
meets both; the table holds each one's best and median round. Both run in float32.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jaxreason import hf, model
from jaxreason.sampler import Engine, Sampling


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="smollm2-135m", choices=sorted(model.PRESETS))
    parser.add_argument("--layers", type=int, default=None, help="instead of the preset's")
    parser.add_argument("--batch", type=int, default=16, help="prompts, and decoding slots")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy, whose tokens are also compared")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own choice")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = model.PRESETS[args.preset].replace(compute_dtype="float32", stop_ids=())
    config = config.replace(num_layers=args.layers or config.arch.num_layers)
    params = model.init(config, jax.random.key(0))
    prompts = np.random.default_rng(0).integers(3, config.arch.vocab_size, (args.batch, args.prompt_tokens))

    with tempfile.TemporaryDirectory() as folder:
        hf.save(params, config, folder, dtype="float32")
        torch_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch_prompts = torch.tensor(prompts)
    sampled = args.temperature > 0
    draw = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if sampled else {}

    def transformers_round() -> np.ndarray:
        with torch.inference_mode():
            out = torch_model.generate(
                torch_prompts, attention_mask=torch.ones_like(torch_prompts), eos_token_id=None, pad_token_id=0,
                max_new_tokens=args.new_tokens, **({"do_sample": False} | draw),
            )  # fmt: skip
        return out[:, args.prompt_tokens :].numpy()

    sampling = Sampling(args.new_tokens, temperature=args.temperature, top_p=args.top_p)
    engine = Engine(config, (), sampling, slots=args.batch)
    decode_params, rows = model.unstack(params, config), prompts.tolist()

    def jaxreason_round() -> np.ndarray:
        return np.stack([done.tokens for done in engine.generate(decode_params, rows, 1, seed=0, step=0)])

    print(f"KV buffers: {engine.kv_bytes(args.prompt_tokens) / 2**20:.0f} MiB", file=sys.stderr)
    contenders = {"transformers": transformers_round, "jaxreason": jaxreason_round}
    tokens = {name: run() for name, run in contenders.items()}  # compiles, allocates
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    report(args, tokens, seconds)
    return 0


def report(args: argparse.Namespace, tokens: dict[str, np.ndarray], seconds: dict[str, list[float]]) -> None:
    drawn = args.batch * args.new_tokens
    best = {name: drawn / min(values) for name, values in seconds.items()}
    median = {name: drawn / statistics.median(values) for name, values in seconds.items()}
    ratio = best["jaxreason"] / best["transformers"]
    same = float(np.mean(tokens["jaxreason"] == tokens["transformers"])) if args.temperature == 0 else None
    if args.json:
        found = {"tokens_per_s": best, "median_tokens_per_s": median, "ratio": ratio, "tokens_in_common": same}
        args.json.write_text(json.dumps({**vars(args), **found, "json": str(args.json)}, indent=1))
    print(f"{args.preset}, float32, batch {args.batch}, {args.prompt_tokens} prompt + {args.new_tokens} new tokens")
    print(f"{'':14}{'best tok/s':>12}{'median tok/s':>14}")
    for name in best:
        print(f"{name:14}{best[name]:12.1f}{median[name]:14.1f}")
    print(f"ratio (best): {ratio:.2f}   tokens in common: {'not compared' if same is None else f'{same:.1%}'}")


if __name__ == "__main__":
    sys.exit(main())
