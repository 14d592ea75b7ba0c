"""A config's plan: every program of the run compiled, and what follows from it, as one plain record."""

import dataclasses
import math

import jax

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.model import param_count
from jaxreason.model.attention import resolve as resolve_attention
from jaxreason.model.cudnn import assume_capability
from jaxreason.model.flops import weight_flops_per_token
from jaxreason.plan import architecture, compile, phases, programs, roofline, speed
from jaxreason.plan.changes import changes
from jaxreason.plan.options import Options, fit_batch, shape_of
from jaxreason.plan.programs import Programs, Shape
from jaxreason.sharding import device_bytes


def plan(name: str, words: list[str], options: Options) -> dict:
    """Compiles and reports; see ``table.show`` for the fields. Raises UserError."""
    if options.devices < 1 or options.hosts < 1:
        raise UserError(f"--devices {options.devices} --hosts {options.hosts}: both are at least 1")
    compile.check_installed()
    config, fitted = fit_batch(name, words, options)
    report = compiled(config, options)
    report |= {"config": name, "words": list(words), "needed_words": fitted}
    if not report["memory"]["fits"]:
        report["changes"] = changes(name, [*words, *fitted], options, report["memory"]["largest_program"])
    return report


def compiled(config: cfg.RunConfig, options: Options) -> dict:
    """The report of one config, whether it fits or not."""
    s = shape_of(config, options)
    run = programs.of(s)
    return report_of(s, run, {name: planned.compile() for name, planned in run.planned.items()}, options)


def report_of(s: Shape, run: Programs, made: dict[str, compile.Program], options: Options) -> dict:
    """What the compiled programs say."""
    target, config = s.place.target, s.config
    with assume_capability(target.capability):
        run_as = s.model.execution
        backend = resolve_attention(run_as.attention, run_as.compute_dtype, s.model.arch.head_dim)
    return {
        "target": options.target, "card": target.name, "hosts": options.hosts, "devices_per_host": options.devices,
        "mesh": dict(s.place.mesh.shape), "algorithm": config.algorithm,
        "model": {
            "source": architecture.resolve(config.model)[1], "parameters": param_count(s.model), "attention": backend,
            "remat": run_as.remat,
        },
        "batch": {"rows": s.rows, "tokens_per_row": s.length, "microbatches": s.microbatches},
        "xla_options": compile.xla.compile_options(s.devices, config.run.deterministic),
        "recompute": _recompute(made["update"], s, options),
        "recompute_head": _head_share(s) if run.head_again else 0.0,
        "attention_per_layer": [n / (s.model.arch.num_layers * s.microbatches) for n in made["update"].attention_calls],
        "programs": [_program(p, run.planned[p.name].beside, s, options) for p in made.values()],
        "memory": _memory(made, run, s),
        "speed": speed.record(s, run, made, options, backend),
    }  # fmt: skip


def _recompute(update: compile.Program, s: Shape, options: Options) -> float:
    """FLOPs of the step's matrix products over those of the convention: 1 where nothing is computed twice.

    Attention's own are not among either, unless it is blockwise, whose products the compiled program shows.
    """
    done = compile.hlo.matmul_flops(update.text, s.microbatches, speed.document_tokens(s, options) / s.length)
    return done / (weight_flops_per_token(s.model) * s.rows * s.length / s.devices)


def _head_share(s: Shape) -> float:
    """The logits made once more, 2·V·D FLOPs a token, over the convention's."""
    return s.model.arch.vocab_size * s.model.arch.embed_dim / (weight_flops_per_token(s.model) / 2)


def _program(p: compile.Program, beside: dict[str, int], s: Shape, options: Options) -> dict:
    found = p.collectives
    moved = roofline.collective_seconds(found, s.place.target, options.hosts, options.devices) if s.devices > 1 else 0.0
    return {
        "name": p.name, "argument_bytes": p.argument_bytes, "temp_bytes": p.temp_bytes, "host_bytes": p.host_bytes,
        "program_bytes": p.total_bytes, "resident_bytes": beside,
        "total_bytes": p.total_bytes + sum(beside.values()), "attention_calls": p.attention_calls,
        "collectives": [dataclasses.asdict(c) | {"total_bytes": c.total_bytes} for c in found],
        "collective_seconds": moved, "compile_seconds": p.seconds,
    }  # fmt: skip


def _memory(made: dict[str, compile.Program], run: Programs, s: Shape) -> dict:
    target, state = s.place.target, phases.abstract_state(s.model, s.config.optimizer, s.place.mesh, s.config.train.freeze)
    params, optimizer = device_bytes(state.model_params), device_bytes(state.opt_state)
    weights = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    temporary = made["update"].temp_bytes
    # Accumulating, the sum and one microbatch's gradient are float32 side by side; without, they need not all live at once.
    gradients = min(4 * weights * (2 if s.microbatches > 1 else 1), temporary)
    totals = {name: p.total_bytes + sum(run.planned[name].beside.values()) for name, p in made.items()}
    worst = max(totals, key=lambda name: totals[name])
    copied = {"decoding_weights": made["decoding weights"].output_bytes} if run.decoding else {}
    return {
        "parameters": params, "optimizer": optimizer, "gradients": gradients, "activations": temporary - gradients,
        **{name.replace(" ", "_"): size for name, size in run.frozen.items()}, **copied,
        **({"kv_cache": run.decoding.cache_bytes} if run.decoding else {}),
        "total": totals[worst], "largest_program": worst, "card": target.memory_bytes, "limit": target.limit_bytes,
        "spare": target.memory_bytes - totals[worst], "fits": totals[worst] <= target.limit_bytes,
    }  # fmt: skip
