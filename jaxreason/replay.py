"""Runs a step again whose loss or gradient was not finite, on the batch that the run kept, and says where it comes from."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxreason import checkpoint
from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.losses import Loss
from jaxreason.model.cudnn import segment_bound
from jaxreason.paths import local
from jaxreason.rl import grpo
from jaxreason.rl.objective import objective_of
from jaxreason.rl.shapes import default_microbatch
from jaxreason.sharding import make_mesh, within
from jaxreason.terminal import console, show_table
from jaxreason.train import not_finite, sft
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.folder import RunFolder
from jaxreason.train.setup import Other, Setup, open_model, put, start_state
from jaxreason.train.step import ITSELF, Compared, make_gradient
from jaxreason.types import Batch, TrainState

_SHOWN = 60  # characters of a row's text


@dataclasses.dataclass(frozen=True)
class Again:
    """A run opened for one of its steps."""

    config: cfg.RunConfig
    setup: Setup
    loss: Loss
    compared: Other | None  # the model that the loss compares with, where it is another one
    second: Compared | None
    folder: RunFolder
    mesh: Mesh


def replay(run: str, update: int | None) -> None:
    """Prints loss, gradient norms and the rows that are not finite, of the kept batch of an update; None: the newest.

    The weights are those of the newest checkpoint that is no later, and the table says of which update they are. Raises
    UserError.
    """
    again = opened(local(run))
    kept = not_finite.updates(again.folder.path)
    if not kept:
        raise UserError(f"{run}: no batch was kept in {again.folder.path / not_finite.FOLDER}: no step was not finite")
    update = kept[-1] if update is None else update
    rows = not_finite.load(again.folder.path, update)
    state, saved = weights(again, update)
    batch = put(rows, again.mesh)
    second = again.compared.params(again.mesh) if again.compared and again.compared.params else None
    gradient = within(again.mesh, jax.jit(gradient_of(again, rows)))

    def measured(part: Batch) -> tuple[float, dict[str, float]]:
        value, norms = gradient(state, part, second)
        return float(value), {name: float(norm) for name, norm in norms.items()}

    value, norms = measured(batch)
    exact = saved in (update, update - 1)
    show_table(f"update {update}", [
        ("weights", f"of update {saved}" + ("" if exact else f", {update - 1 - saved} updates before those of the step")),
        ("loss", f"{value:.6g}"),
        ("gradient norm", f"{math.sqrt(sum(norm**2 for norm in norms.values())):.6g}"),
        *[(f"  {name}", f"{norm:.4g}") for name, norm in norms.items()],
        *[("input", text) for text in bad_inputs(rows)],
    ])  # fmt: skip
    lines = [
        (f"row {row}", f"loss {loss:.4g}, gradient norm {norm:.4g}: {text!r}")
        for row, loss, norm, text in bad_rows(again, rows, batch, measured)
    ]
    show_table("rows that are not finite alone", lines or [("none", "each row alone is finite with these weights")])


def opened(run: Path) -> Again:
    """The config, model and loss of a run; reads no data. Raises UserError."""
    saved = run / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.yaml")
    values = cfg.read_run(saved)
    values["run"] = values["run"] | {"name": run.resolve().name, "dir": str(run.resolve().parent)}
    config = cfg.build(values, (), str(saved))
    folder, mesh = RunFolder(config), make_mesh(config.mesh)
    setup = open_model(config, folder)
    if isinstance(config, cfg.SftConfig):
        loss = sft.find_loss(config)
        other, _ = sft.compared_with(config, loss, setup)
        return Again(config, setup, loss, other, other.compared if other else None, folder, mesh)
    loss, compared, second = objective_of(config).loss, None, None
    if config.teacher.divergence is not None:
        compared = grpo.teacher_of(config, setup)[0]
        second = compared.compared if compared else ITSELF
    return Again(config, setup, loss, compared, second, folder, mesh)


def weights(again: Again, update: int) -> tuple[TrainState, int]:
    """The state of the newest checkpoint up to ``update``, else the run's start, and the updates that it has had."""
    config, mesh = again.config, again.mesh
    total = config.train.steps or 1  # the schedule is not looked at
    optimizer = opt.of_run(config, total)
    found = [step for step in checkpoint.steps(again.folder.checkpoints) if step <= update]
    if not found:
        return start_state(config, again.setup, optimizer, mesh), 0
    abstract = states.abstract(again.setup.config, optimizer, mesh, config.train.freeze)
    base = functools.partial(again.setup.base_params, mesh) if again.setup.config.adapter else None
    return again.folder.saved().restore(found[-1], abstract, base)[0], found[-1]


def gradient_of(again: Again, rows: Batch[np.ndarray]) -> Callable:
    """``(state, batch, second) -> (loss, {module: gradient norm})``, as the step computes them."""
    config, count = again.config, len(rows.tokens)
    model = again.setup.config.replace(max_segments=segment_bound(int(rows.segment_ids.max()) + 1))
    if isinstance(config, cfg.SftConfig):
        micro, temperature, noise = config.train.microbatch_size or count, 1.0, sft.noise_of(config)
    else:
        micro = config.train.microbatch_size or default_microbatch(count, again.mesh)
        temperature, noise = config.rollout.temperature, None
    gradient = make_gradient(model, again.loss, count // micro, temperature, again.second, noise)

    def found(state: TrainState, batch: Batch, second: dict | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, _, grads, _ = gradient(state.params, batch, second, state.step, state.frozen)
        squares: dict[str, jax.Array] = {}
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            module = ".".join(str(key.key) for key in path[:-1]) or str(path[-1].key)
            squares[module] = squares.get(module, jnp.zeros(())) + jnp.sum(jnp.square(grad))
        return value, {module: jnp.sqrt(square) for module, square in squares.items()}

    return found


def bad_inputs(rows: Batch[np.ndarray]) -> list[str]:
    """The fields of the batch that are not finite, each with its rows."""
    found = []
    for name, value in not_finite.fields(rows).items():
        if len(bad := np.flatnonzero(~np.isfinite(value).all(axis=1))):
            found.append(f"{name} is not finite in row {', '.join(map(str, bad[:20]))}")
    return found


def bad_rows(
    again: Again, rows: Batch[np.ndarray], batch: Batch, measured: Callable[[Batch], tuple[float, dict[str, float]]]
) -> list[tuple[int, float, float, str]]:
    """(row, loss, gradient norm, text) of each row that, with all others emptied, is not finite."""
    found = []
    for row in range(len(rows.tokens)):
        if not (rows.segment_ids[row] > 0).any():
            continue
        alone = jax.tree.map(lambda x: jnp.where(jnp.arange(len(x))[:, None] == row, x, jnp.zeros_like(x)), batch)  # noqa: B023
        loss, norms = measured(alone)
        norm = math.sqrt(sum(value**2 for value in norms.values()))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            text = again.setup.tokenizer.decode(rows.tokens[row][rows.segment_ids[row] > 0].tolist())
            found.append((row, loss, norm, text if len(text) <= _SHOWN else text[:_SHOWN] + " …"))
        if row % 32 == 31:
            console.print(f"{row + 1} of {len(rows.tokens)} rows")
    return found
