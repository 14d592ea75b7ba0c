"""What is planned for, and the shapes that a config has there."""

import dataclasses
import math

import jax

from jaxreason import config as cfg
from jaxreason import targets
from jaxreason.errors import UserError
from jaxreason.plan import architecture, compile
from jaxreason.plan.phases import Place
from jaxreason.plan.programs import Shape
from jaxreason.rl import shapes
from jaxreason.rl.objective import objective_of
from jaxreason.train.setup import adapter_of
from jaxreason.types import BATCH_AXES

_PHRASE_TOKENS = 64  # of a second turn's phrase and template, which no tokenizer is here to count


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned for, beside the config."""

    target: str = "h100"
    hosts: int = 1  # each of them one process
    devices: int = 1  # of one host
    price: float | None = None  # USD for a GPU hour; None: the target's assumption
    document_tokens: int | None = None  # mean tokens of an example; None: the longest allowed
    examples: int | None = None  # of one epoch; None: data.max_rows


def shape_of(config: cfg.RunConfig, options: Options) -> Shape:
    """Where and in what sizes the config runs. Raises UserError."""
    target = targets.load(options.target)
    model, _ = architecture.resolve(config.model)
    model = dataclasses.replace(model, adapter=adapter_of(config.lora, model))
    mesh = compile.mesh_of(target, options.hosts, options.devices, config.mesh)
    place = Place(target, mesh, config.run.deterministic)
    if config.algorithm == "sft":
        rows = config.data.batch_size
        micro = config.train.microbatch_size or rows
        return Shape(config, model, place, options.hosts, rows, config.data.max_length, rows // micro)
    loss = objective_of(config).loss
    longest = shapes.longest_prompt(config, config.data.max_prompt_tokens, _PHRASE_TOKENS)
    found = shapes.shapes_of(config, loss, longest, mesh, options.hosts, _context_tokens(config))
    return Shape(config, model, place, options.hosts, found.rows, found.row_length, found.microbatches, loss, found)


def _context_tokens(config: cfg.GrpoConfig) -> int:
    """Tokens by which a teacher's prompt is longer than the policy's, at most; what the data would tell is assumed."""
    told = {None: 0, "answer": _PHRASE_TOKENS}.get(config.teacher.context, config.rollout.max_completion_tokens + _PHRASE_TOKENS)
    return 0 if config.teacher.context is None else config.teacher.max_context_tokens or told


def fit_batch(name: str, words: list[str], options: Options) -> tuple[cfg.RunConfig, list[str]]:
    """The config, and the words that a mesh of this many devices forces on it: whole rows for every device."""
    config = cfg.load(name, words)
    least = ways(config.mesh, options.hosts * options.devices)
    found = []
    if config.algorithm == "grpo" and config.rollout.prompts_per_step % options.hosts:
        prompts = math.ceil(config.rollout.prompts_per_step / options.hosts) * options.hosts
        found.append(f"rollout.prompts_per_step={prompts}")
        config = cfg.load(name, [*words, *found])
    rows, micro = rows_of(config), microbatch(config, least)
    if rows % micro == 0 and micro % least == 0:
        return config, found
    wanted = math.ceil(micro / least) * least
    found.insert(0, f"train.microbatch_size={wanted}")
    if rows % wanted:
        rows = math.ceil(rows / wanted) * wanted
        if config.algorithm == "grpo":
            group = config.rollout.group_size * (1 + config.second_turn.samples)
            exact = rows * config.train.minibatches / group
            if exact != int(exact) or int(exact) % options.hosts:
                raise UserError(
                    f"{least} devices need a multiple of {wanted} sequences in an update, and {options.hosts} hosts one of "
                    f"{options.hosts} prompts: change rollout.prompts_per_step or rollout.group_size"
                )
            found[1:] = [f"rollout.prompts_per_step={int(exact)}"]
        else:
            found.append(f"data.batch_size={rows}")
    return cfg.load(name, [*words, *found]), found


def ways(mesh: cfg.Mesh, devices: int) -> int:
    """Devices that share a batch's rows."""
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor")}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    return math.prod(devices // fixed if sizes[axis] == -1 else sizes[axis] for axis in BATCH_AXES)


def rows_of(config: cfg.RunConfig) -> int:
    """Rows of one optimizer step."""
    return config.data.batch_size if config.algorithm == "sft" else shapes.rows_of(config)


def microbatch(config: cfg.RunConfig, least: int) -> int:
    """Rows of a microbatch; ``least``: devices that share them."""
    rows = rows_of(config)
    if config.train.microbatch_size or config.algorithm == "sft":
        return config.train.microbatch_size or rows
    return shapes.default_microbatch(rows, jax.sharding.AbstractMesh((least, 1), BATCH_AXES))
