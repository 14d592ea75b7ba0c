"""A config's plan: every program of the run compiled, and what follows from it, as one plain record."""

import dataclasses
import math

import jax

from jaxreason import config as cfg
from jaxreason import losses, targets
from jaxreason.errors import UserError
from jaxreason.model import LlamaConfig, param_count
from jaxreason.model.attention import resolve as resolve_attention
from jaxreason.model.cudnn import assume_capability
from jaxreason.model.flops import matmul_weights, train_flops_per_token
from jaxreason.plan import architecture, compile, phases, roofline
from jaxreason.plan.phases import Place
from jaxreason.rollout import Engine, Sampling, cache
from jaxreason.rollout.run import prefill_rows
from jaxreason.sharding import BATCH_AXES
from jaxreason.train.grpo import find_loss
from jaxreason.train.rollouts import row_length

DECODE_FRACTION = 0.71  # of the bandwidth limit: what SkyRL-tx, the fastest published JAX engine, reached

_PHRASE_TOKENS = 64  # of a correction's guiding phrase and template


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned for, beside the config."""

    target: str = "h100"
    hosts: int = 1
    devices: int = 1  # of one host
    price: float | None = None  # USD for a GPU hour; None: the target's assumption
    document_tokens: int | None = None  # mean tokens of an example; None: the longest allowed
    examples: int | None = None  # of one epoch; None: data.max_rows


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What all phases need to know of a config."""

    config: cfg.RunConfig
    model: LlamaConfig
    source: str
    place: Place
    rows: int  # of one optimizer step
    length: int  # of a row
    microbatches: int


def plan(name: str, words: list[str], options: Options) -> dict:
    """Compiles and reports; see ``table.show`` for the fields. Raises UserError."""
    if options.devices < 1 or options.hosts < 1:
        raise UserError(f"--devices {options.devices} --hosts {options.hosts}: both are at least 1")
    compile.check_installed()
    config, fitted = fit_batch(name, words, options)
    report = compiled(config, options)
    report |= {"config": name, "words": list(words), "needed_words": fitted}
    if not report["memory"]["fits"]:
        report["changes"] = changes(name, [*words, *fitted], options)
    return report


def fit_batch(name: str, words: list[str], options: Options) -> tuple[cfg.RunConfig, list[str]]:
    """The config, and the words that a mesh of this many devices forces on it: whole rows for every device."""
    config = cfg.load(name, words)
    ways = _ways(config.mesh, options.hosts * options.devices)
    rows, micro = _rows(config), _micro(config)
    if rows % micro == 0 and micro % ways == 0:
        return config, []
    wanted = math.ceil(micro / ways) * ways
    found = [f"train.microbatch_size={wanted}"]
    if rows % wanted:
        rows = math.ceil(rows / wanted) * wanted
        if config.algorithm == "grpo":
            group = config.rollout.group_size * (1 + config.correction.samples)
            prompts = rows * config.train.minibatches / group
            if prompts != int(prompts):
                raise UserError(
                    f"{ways} devices need a multiple of {wanted} sequences in an update: change "
                    "rollout.prompts_per_step or rollout.group_size"
                )
            found.append(f"rollout.prompts_per_step={int(prompts)}")
        else:
            found.append(f"data.batch_size={rows}")
    return cfg.load(name, [*words, *found]), found


def _ways(mesh: cfg.Mesh, devices: int) -> int:
    """Devices that share a batch's rows."""
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor")}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    return math.prod(devices // fixed if sizes[axis] == -1 else sizes[axis] for axis in BATCH_AXES)


def _rows(config: cfg.RunConfig) -> int:
    if config.algorithm == "sft":
        return config.data.batch_size
    layers = 1 + config.correction.samples
    return config.rollout.prompts_per_step * config.rollout.group_size * layers // config.train.minibatches


def _micro(config: cfg.RunConfig) -> int:
    return config.train.microbatch_size or (_rows(config) if config.algorithm == "sft" else min(_rows(config), 32))


def _length(config: cfg.RunConfig) -> int:
    if config.algorithm == "sft":
        return config.data.max_length
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    if config.correction.samples:  # a second prompt holds the first, its completion and a phrase
        longest += config.rollout.max_completion_tokens + _PHRASE_TOKENS
    return row_length(longest)


def compiled(config: cfg.RunConfig, options: Options) -> dict:
    """The report of one config, whether it fits or not."""
    target = targets.load(options.target)
    model, source = architecture.resolve(config.model)
    mesh = compile.mesh_of(target, options.hosts, options.devices, config.mesh)
    rows = _rows(config)
    shape = _Shape(config, model, source, Place(target, mesh), rows, _length(config), rows // _micro(config))
    programs, resident, decoding = _sft(shape) if config.algorithm == "sft" else _grpo(shape)
    with assume_capability(target.capability):
        backend = resolve_attention(model.attention, model.compute_dtype, model.head_dim)
    price = target.usd_per_hour if options.price is None else options.price
    devices = options.hosts * options.devices
    return {
        "target": options.target, "card": target.name, "hosts": options.hosts, "devices_per_host": options.devices,
        "mesh": dict(mesh.shape), "algorithm": config.algorithm,
        "model": {"source": source, "parameters": param_count(model), "attention": backend, "remat": model.remat},
        "batch": {"rows": rows, "tokens_per_row": shape.length, "microbatches": shape.microbatches},
        "recompute": _recompute(programs[0], shape),
        "programs": [_program(p, resident[p.name], shape, devices, options) for p in programs],
        "memory": _memory(programs, resident, target, shape),
        "speed": _speed(shape, options, devices, price, decoding),
    }  # fmt: skip


# ---- the programs of each algorithm: (programs, what else is on the device beside each, decoding's context)


def _sft(s: _Shape):
    batch = phases.abstract_batch(s.rows, s.length, s.place.mesh)
    loss = losses.get(s.config.loss.name, **s.config.loss.options)
    program = phases.update(s.place, s.model, s.config.optimizer, loss, batch, s.microbatches)
    return [program], {"update": {}}, None


def _grpo(s: _Shape):
    c = s.config
    loss, reference = find_loss(c), c.kl.coef > 0
    present = {
        "advantages": True, "sampler_logp": True, "group_tokens": True, "ref_logp": reference,
        "old_logp": c.train.updates_per_rollout > 1 or loss.select is not None, "selected": loss.select is not None,
    }  # fmt: skip
    floats = tuple(name for name, there in present.items() if there)
    batch = phases.abstract_batch(s.rows, s.length, s.place.mesh, floats)
    temperature = c.rollout.temperature
    programs = [phases.update(s.place, s.model, c.optimizer, loss, batch, s.microbatches, temperature)]
    state = {"train state": compile.device_bytes(phases.abstract_state(s.model, c.optimizer, s.place.mesh))}
    models = {"reference": s.model} if reference else {}
    if c.teacher.weights:
        other = {"weights": c.teacher.weights, "preset": None, "overrides": {}}
        models["teacher"] = architecture.resolve(c.model.model_copy(update=other))[0]
    offloaded = {"reference": c.kl.offload, "teacher": c.teacher.offload}
    frozen = {}  # what stays on the devices all the time
    for name, model in models.items():
        programs.append(phases.score(s.place, name, model, batch, s.microbatches, temperature))
        if not offloaded[name]:
            frozen[f"{name} model"] = compile.device_bytes(phases.abstract_params(model, s.place.mesh, model.compute_dtype))
    # Every device, whatever its mesh axis, decodes its own share of the slots with whole weights.
    sampling = Sampling(
        temperature=temperature, top_p=c.rollout.top_p, top_k=c.rollout.top_k, min_p=c.rollout.min_p,
        max_completion_tokens=c.rollout.max_completion_tokens,
    )  # fmt: skip
    slots = math.ceil(c.rollout.slots / s.place.mesh.size)
    engine = Engine(s.model, s.model.stop_ids or (0,), sampling, slots)
    length = cache.longest(s.length)
    prompts = prefill_rows(c.data.max_prompt_tokens, slots, devices=1)
    programs += [
        phases.prefill(s.place, engine, prompts, cache.bucket(c.data.max_prompt_tokens, length)),
        phases.decode(s.place, engine, length),
    ]
    buffers = {"decoding caches": cache.num_bytes(s.model, slots, length)}
    resident = {"update": frozen, "prefill": state | frozen | buffers, "decode": state | frozen}
    for name in models:
        resident[name] = state | {key: size for key, size in frozen.items() if key != f"{name} model"}
    mean = c.data.max_prompt_tokens / 2 + c.rollout.max_completion_tokens / 2
    return programs, resident, (slots, mean)


def _recompute(update: compile.Program, s: _Shape) -> float:
    """FLOPs of the step's matrix products over those of the convention: 1 where nothing is computed twice."""
    tokens = s.rows * s.length / s.place.mesh.size
    done = compile.hlo.matmul_flops(update.text, s.microbatches)
    return done / (6 * matmul_weights(s.model) * tokens)


def _program(p: compile.Program, resident: dict, s: _Shape, devices: int, options: Options) -> dict:
    found = p.collectives
    moved = roofline.collective_seconds(found, s.place.target, options.hosts, options.devices) if devices > 1 else 0.0
    return {
        "name": p.name, "argument_bytes": p.argument_bytes, "temp_bytes": p.temp_bytes, "host_bytes": p.host_bytes,
        "program_bytes": p.total_bytes, "resident_bytes": resident,
        "total_bytes": p.total_bytes + sum(resident.values()), "custom_calls": compile.hlo.custom_calls(p.text),
        "collectives": [dataclasses.asdict(c) | {"total_bytes": c.total_bytes} for c in found],
        "collective_seconds": moved, "compile_seconds": p.seconds,
    }  # fmt: skip


def _memory(programs, resident: dict, target, s: _Shape) -> dict:
    state = phases.abstract_state(s.model, s.config.optimizer, s.place.mesh)
    update = programs[0]
    params, optimizer = compile.device_bytes(state.params), compile.device_bytes(state.opt_state)
    weights = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    # Accumulating, the sum and one microbatch's gradient are float32 side by side.
    gradients = 4 * weights * (2 if s.microbatches > 1 else 1)
    totals = {p.name: p.total_bytes + sum(resident[p.name].values()) for p in programs}
    worst = max(totals, key=totals.get)
    return {
        "parameters": params, "optimizer": optimizer, "gradients": gradients,
        "activations": update.temp_bytes - gradients,
        **({"kv_cache": resident["prefill"]["decoding caches"]} if "prefill" in resident else {}),
        "total": totals[worst], "largest_program": worst, "card": target.memory_bytes, "limit": target.limit_bytes,
        "spare": target.memory_bytes - totals[worst], "fits": totals[worst] <= target.limit_bytes,
    }  # fmt: skip


def _speed(s: _Shape, options: Options, devices: int, price: float, decoding) -> dict:
    target, c = s.place.target, s.config
    document = min(options.document_tokens or s.length, s.length)
    flops = train_flops_per_token(s.model, [document])
    trained = roofline.train_speed(flops, s.rows * s.length, target, devices)
    updates, rollouts = _steps(c, s, options, document)
    record = {
        "flops_per_token": flops, "document_tokens": document, "step_tokens": s.rows * s.length,
        "train": [dataclasses.asdict(speed) for speed in trained], "updates": updates, "rollouts": rollouts,
        "usd_per_gpu_hour": price,
    }  # fmt: skip
    rollout = forwards = 0.0
    if decoding:
        slots, context = decoding
        rate = roofline.decode_tokens_per_second(s.model, target, slots, context)
        drawn = c.rollout.prompts_per_step * c.rollout.group_size * (1 + c.correction.samples) * c.rollout.max_completion_tokens
        rollout = drawn / (rate * devices)
        # Forward passes over every row of a rollout: the reference's, and the policy's own where updates repeat.
        forwards = ((c.kl.coef > 0) + bool(c.teacher.weights) + (c.train.updates_per_rollout > 1)) * c.train.minibatches / 3
        record["decode"] = {
            "slots_per_device": slots, "mean_context": context, "tokens_per_second_per_device": rate,
            "kv_bytes_per_token": roofline.kv_bytes_per_token(s.model), "rollout_seconds": rollout,
        }  # fmt: skip
    if updates:
        record["recipe"] = []
        for speed in trained:
            seconds = speed.step_seconds * (updates + rollouts * forwards) + rollouts * rollout / DECODE_FRACTION
            record["recipe"].append(
                {"mfu": speed.mfu, "hours": seconds / 3600, "usd": seconds / 3600 * devices * price}
            )
    return record


def _steps(c: cfg.RunConfig, s: _Shape, options: Options, document: int) -> tuple[int | None, int]:
    """(optimizer updates, rollouts) of the whole recipe; None if that needs the data."""
    examples = options.examples or c.data.max_rows
    if c.algorithm == "grpo":
        rollouts = c.train.steps or (examples and math.ceil(c.train.epochs * examples / c.rollout.prompts_per_step))
        return (rollouts * c.train.updates_per_rollout, rollouts) if rollouts else (None, 0)
    if c.train.steps:
        return c.train.steps, 0
    if examples is None:
        return None, 0
    rows = examples * document / s.length if c.data.packing else examples
    return math.ceil(c.train.epochs * rows / s.rows), 0


# ---- what would fit


def changes(name: str, words: list[str], options: Options, wanted: int = 3, tries: int = 8) -> list[dict]:
    """The nearest changes that fit, each compiled: the first ``wanted`` of at most ``tries``."""
    config = cfg.load(name, words)
    found = []
    for extra, devices in _candidates(config, options)[:tries]:
        changed = dataclasses.replace(options, devices=devices)
        try:
            there, fitted = fit_batch(name, [*words, *extra], changed)
            memory = compiled(there, changed)["memory"]
        except UserError:
            continue
        found.append({"words": [*extra, *fitted], "devices": devices, "total": memory["total"], "fits": memory["fits"]})
        if sum(one["fits"] for one in found) == wanted:
            break
    return found


def _candidates(config: cfg.RunConfig, options: Options) -> list[tuple[list[str], int]]:
    """From what costs nothing to what costs most."""
    ways = _ways(config.mesh, options.hosts * options.devices)
    micro = _micro(config)
    single = []
    if config.optimizer.moment_dtype == "float32":
        single.append(["optimizer.moment_dtype=bfloat16"])
    if micro > ways:
        single.append([f"train.microbatch_size={ways}"])
    order = ["none", "matmuls", "attention", "full"]
    remat = [[f"model.remat={policy}"] for policy in order[order.index(config.model.remat) + 1 :]]
    combined = [[word for change in single for word in change]] if len(single) > 1 else []
    with_remat = [[*(word for change in single for word in change), *change] for change in remat] if single else []
    rollout = []
    if config.algorithm == "grpo" and config.rollout.slots > 1:
        rollout = [[f"rollout.slots={config.rollout.slots // 2}"]]
        if config.kl.coef > 0:
            rollout += [["kl.coef=0"]] if config.kl.offload else [["kl.offload=true"], ["kl.coef=0"]]
        if config.teacher.weights and not config.teacher.offload:
            rollout.append(["teacher.offload=true"])
    here = [(change, options.devices) for change in [*single, *rollout, *remat, *combined, *with_remat]]
    more = [([], options.devices * factor) for factor in (2, 4, 8) if options.devices * factor <= 8]
    return [*here[:5], *more[:1], *here[5:], *more[1:]]
