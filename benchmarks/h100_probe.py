"""One measurement on a real GPU, as one JSON object on the last line of standard output.

    python benchmarks/h100_probe.py numerics|train|repeat|decode|head [--preset NAME] [--length N] [--loss NAME] [key=value ...]

benchmarks/h100.py runs all of them, each in a process of its own and under a time limit.
"""

import argparse
import hashlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from h100_account import account

from jaxreason import config as cfg
from jaxreason import losses, targets, xla
from jaxreason.model import init, preset, unstack
from jaxreason.model.attention import attention, cached_attention, resolve
from jaxreason.model.cudnn import segment_bound
from jaxreason.model.flops import train_flops_per_token
from jaxreason.model.vocab import online, two_passes
from jaxreason.plan import roofline
from jaxreason.sampler import Engine, Sampling
from jaxreason.sharding import batch_sharding, make_mesh, replicated
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.step import make_train_step
from jaxreason.types import MAX_SEGMENTS, Batch


def facts() -> dict:
    device = jax.devices()[0]
    return {
        "device": device.device_kind, "platform": device.platform, "devices": jax.device_count(),
        "capability": getattr(device, "compute_capability", None), "jax": jax.__version__,
        "attention": resolve("auto", jnp.bfloat16, 128),
    }  # fmt: skip


def packed_ids(rows: int, length: int, mean: int, seed: int = 0) -> np.ndarray:
    """Rows of segments of about ``mean`` tokens, the last few tokens padding."""
    random, ids = np.random.default_rng(seed), np.zeros((rows, length), np.int32)
    for row in ids:
        at = segment = 0
        while at < length - length // 64:
            size = int(random.integers(mean // 2, mean + mean // 2))
            segment += 1
            row[at : min(at + size, length - length // 64)] = segment
            at += size
    return ids


def numerics(args) -> dict:
    """cuDNN against float32 and beside blockwise in the same bfloat16: values, gradients, leakage, decoding."""
    rows, length, heads, kv_heads, size = 2, min(args.length, 2048), 24, 8, 128
    ids = packed_ids(rows, length, length // 6)
    random = np.random.default_rng(1)
    exact = [random.standard_normal((rows, length, n, size), np.float32) for n in (heads, kv_heads, kv_heads, heads)]

    def run(backend, dtype, arrays):
        q, k, v, weight = (jnp.asarray(x, dtype) for x in arrays)

        def total(q, k, v):
            out = attention(q, k, v, ids, backend)
            return jnp.sum((out * weight).astype(jnp.float32)), out

        (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    def errors(found, wanted):
        return {n: float(np.abs(a - b).max()) for n, a, b in zip(("out", "dq", "dk", "dv"), found, wanted)}

    with jax.default_matmul_precision("highest"):  # a GPU's float32 products are TF32 otherwise
        wanted = run("reference", jnp.float32, exact)
    yardstick = errors(run("blockwise", jnp.bfloat16, exact), wanted)
    found = {"blockwise_error": yardstick, "backend": resolve("auto", jnp.bfloat16, size)}
    if found["backend"] != "cudnn":
        return found | {"ok": False, "reason": "cuDNN attention is not available here"}
    ours = run("cudnn", jnp.bfloat16, exact)
    found["cudnn_error"] = errors(ours, wanted)
    # Everything outside one segment replaced: nothing inside it may move.
    keep = (ids == 2)[..., None, None]
    other = [np.where(keep, x, 9 * np.random.default_rng(2).standard_normal(x.shape, np.float32)) for x in exact]
    moved = [np.where(keep, np.abs(a - b), 0).max() for a, b in zip(run("cudnn", jnp.bfloat16, other), ours)]
    found["leakage"] = dict(zip(("out", "dq", "dk", "dv"), map(float, moved)))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in exact[:3])
    cache, lengths = (k.swapaxes(1, 2), v.swapaxes(1, 2)), np.array([7, length])
    visible = jnp.arange(length) < lengths[:, None, None]
    steps = [np.asarray(cached_attention(q[:, -1:], *cache, visible, b), np.float32) for b in ("cudnn", "blockwise")]
    found["decode_error"] = float(np.abs(steps[0] - steps[1]).max())
    close = all(found["cudnn_error"][n] <= 2 * yardstick[n] + 1e-2 for n in yardstick)
    tight = found["leakage"]["out"] == 0 and max(found["leakage"].values()) < 1e-2 and found["decode_error"] < 2e-2
    return found | {"ok": bool(close and tight)}


def model_of(args, segments: int = MAX_SEGMENTS):
    return preset(args.preset).replace(
        param_dtype="float32", compute_dtype="bfloat16", remat="matmuls", scan_layers=not args.unrolled,
        max_segments=segment_bound(segments),
    )  # fmt: skip


def batch_of(args, vocab: int) -> Batch:
    """Random tokens in packed rows; for a policy loss also what a rollout would have left."""
    random, ids = np.random.default_rng(0), packed_ids(args.rows * jax.device_count() * args.microbatches, args.length,
                                                       args.length // args.documents)  # fmt: skip
    if args.documents == 1:
        ids = np.ones_like(ids)
    tokens = random.integers(0, vocab, ids.shape, np.int32)
    positions = np.arange(args.length) - np.maximum.accumulate(
        np.where(np.diff(ids, axis=1, prepend=-1) != 0, np.arange(args.length), 0), axis=1
    )
    more = {}
    if losses.get(args.loss).kind == "policy":
        near = (np.log(1 / vocab) + random.normal(0, 0.1, (3, *ids.shape))).astype(np.float32)
        more = {name: value for name, value in zip(("old_logp", "ref_logp", "sampler_logp"), near)}
        more |= {"advantages": random.normal(0, 1, ids.shape).astype(np.float32), "group_ids": np.zeros_like(ids),
                 "group_tokens": np.full(ids.shape, ids.size, np.float32)}  # fmt: skip
    mask = (ids > 0).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, 1), positions.astype(np.int32), ids, mask, **more)


def stepper(args, words: list[str]):
    """(the compiled step, how to make a fresh state, the batch on the devices, seconds of compiling, the architecture)."""
    overrides = cfg.parse_words(cfg.Optimizer, words) if words else cfg.Optimizer(moment_dtype="bfloat16")
    rows = batch_of(args, preset(args.preset).arch.vocab_size)
    config, mesh = model_of(args, int(rows.segment_ids.max()) + 1), make_mesh(cfg.Mesh())
    optimizer, schedule = opt.make(overrides, 1000), opt.schedule(overrides, 1000)
    step = make_train_step(config, losses.get(args.loss), optimizer, schedule, args.microbatches)
    with jax.set_mesh(mesh):
        batch = jax.device_put(rows, batch_sharding(mesh))
        state = states.abstract(config, optimizer, mesh)
        out = (jax.tree.map(lambda x: x.sharding, state), replicated(mesh), batch_sharding(mesh))
        began = time.monotonic()
        compiled = jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch).compile()
    return compiled, lambda: states.create(config, optimizer, mesh, 0), batch, time.monotonic() - began, config


def train(args) -> dict:
    """Optimizer steps on random tokens: seconds, tokens/s, MFU, and the allocator's peak beside the compiler's sum."""
    compiled, fresh, batch, compiling, config = stepper(args, args.words)
    state, times, value = fresh(), [], 0.0
    for _ in range(args.steps + 2):
        began = time.monotonic()
        state, metrics, _ = compiled(state, batch)
        value = float(jax.block_until_ready(metrics["loss"]))
        times.append(time.monotonic() - began)
    seconds, ids = float(np.median(times[2:])), np.asarray(batch.segment_ids)
    counts = [np.bincount(row) for row in ids]
    flops = train_flops_per_token(config, np.concatenate([row[row > 0] for row in counts])) * ids.size / seconds
    memory = compiled.memory_analysis()
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    statistics = jax.local_devices()[0].memory_stats() or {}
    more = {"account": account(lambda: compiled(state, batch))} if args.account else {}
    return more | {
        "loss_name": args.loss, "compile_seconds": compiling, "step_seconds": seconds, "tokens_per_second": ids.size / seconds,
        "mfu": flops / (jax.device_count() * targets.load(args.target).bf16_flops_per_s), "loss": value,
        "planned_bytes": planned + memory.temp_size_in_bytes, "peak_bytes": statistics.get("peak_bytes_in_use"),
        "ok": bool(np.isfinite(value)),
    }  # fmt: skip


def repeat(args) -> dict:
    """Three steps twice from one start under run.deterministic: the same bits, or in how many parameters not."""
    compiled, fresh, batch, _, _ = stepper(args, args.words)

    def digests() -> list[str]:
        state = fresh()
        for _ in range(3):
            state, *_ = compiled(state, batch)
        return [hashlib.sha256(np.asarray(leaf)).hexdigest() for leaf in jax.tree.leaves(state.params)]

    first, second = digests(), digests()
    differing = sum(a != b for a, b in zip(first, second))
    return {"parameters": len(first), "parameters_that_differ": differing, "ok": differing == 0}


def decode(args) -> dict:
    """The rollout engine on random weights, which never stop: tokens/s and its share of the bandwidth limit."""
    config = model_of(args).replace(param_dtype="bfloat16", remat="none")
    weights = jax.jit(lambda key: unstack(init(config, key), config))(jax.random.key(0))
    limit, prompt = args.length, 128
    engine = Engine(config, (), Sampling(temperature=1.0, max_completion_tokens=limit), slots=args.slots)
    prompts = np.random.default_rng(0).integers(0, config.arch.vocab_size, (args.slots // 4, prompt)).tolist()
    engine.generate(weights, prompts, 4, seed=0, step=0)  # compiles every bucket
    began = time.monotonic()
    done = engine.generate(weights, prompts, 4, seed=1, step=0)
    seconds = time.monotonic() - began
    rate = sum(len(c.tokens) for c in done) / seconds
    bound = roofline.decode_tokens_per_second(config, targets.load(args.target), args.slots, prompt + limit / 2)
    return {"tokens_per_second": rate, "of_bandwidth_limit": rate / bound, "seconds": seconds, "ok": rate > 0}


def head(args) -> dict:
    """Maximum and Σ e^(z − maximum) of a chunk's logits: milliseconds in one pass, and in the two that a CPU makes."""
    shape = min(args.length, 4096), preset(args.preset).arch.vocab_size
    z = jax.jit(lambda key: 4.0 * jax.random.normal(key, shape))(jax.random.key(0))

    found, values = {}, {}
    for name, function in (("one_pass", online), ("two_passes", two_passes)):
        compiled, times = jax.jit(function), []
        for _ in range(args.steps + 2):
            began = time.monotonic()
            values[name] = jax.block_until_ready(compiled(z))
            times.append(time.monotonic() - began)
        found[f"{name}_ms"] = 1e3 * float(np.median(times[2:]))
    error = float(jnp.abs(values["one_pass"][1] / values["two_passes"][1] - 1).max())
    return found | {"relative_error": error, "ok": error < 1e-4}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=sorted(PARTS))
    parser.add_argument("--preset", default="llama3.2-3b")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row, or of a completion")
    parser.add_argument("--loss", default="nll", help="of train and repeat; grpo: a policy's update")
    parser.add_argument("--documents", type=int, default=2, help="of a row, about; 1: one that fills it")
    parser.add_argument("--unrolled", action="store_true", help="model.scan_layers: false")
    parser.add_argument("--account", action="store_true", help="also kernels by kind, from a profile of one more step")
    parser.add_argument("--rows", type=int, default=1, help="rows of a microbatch on one device")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys of the section optimizer")
    return parser


PARTS = {"train": train, "repeat": repeat, "decode": decode, "numerics": numerics, "head": head}


def main() -> None:
    args = arguments().parse_intermixed_args()
    settings = xla.configure(xla.detect(), deterministic=args.what == "repeat")
    found = PARTS[args.what](args)
    if jax.devices()[0].platform != "gpu":
        found |= {"ok": False, "reason": f"no GPU: this ran on {jax.devices()[0].platform}"}
    print(json.dumps({"what": args.what, **facts(), **found, "settings": settings}))


if __name__ == "__main__":
    main()
