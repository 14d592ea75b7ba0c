"""What a path to a model means: a run, one of its checkpoints, a Hugging Face directory, or a hub id."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

import jax
from jax.sharding import Mesh

from jaxreason import checkpoint, hf
from jaxreason import config as cfg
from jaxreason.errors import UserError, present
from jaxreason.hf.table import flatten, unflatten
from jaxreason.model import Adapter, ModelConfig, full_shapes, lora, quantized, shapes
from jaxreason.paths import local
from jaxreason.restore import restore_each, restore_tree
from jaxreason.sharding import leaf_sharding, shardings
from jaxreason.terminal import Working
from jaxreason.types import merge

_SAMPLES, _SAMPLE_BYTES = 64, 2**16  # of a weight file, evenly spaced: training changes nearly every parameter


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Where weights are."""

    kind: Literal["checkpoint", "hf"]
    path: Path  # of the checkpoint's step or of the Hugging Face directory
    held: IO | None = dataclasses.field(default=None, compare=False, repr=False)
    """Open for as long as the source is used: its run, which may be training, does not delete the checkpoint meanwhile."""

    @classmethod
    def at(cls, path: str) -> "WeightSource":
        """The source at a path that :func:`locate` has found before."""
        place = Path(path)
        if (place / checkpoint.MODEL).is_file():
            return cls("checkpoint", place, checkpoint.hold(place))
        return cls("hf", place)

    def digest(self) -> str:
        """Tells these weights from others, in a moment: of a checkpoint its manifest, which lists a hash of every file; of a
        Hugging Face directory the names, sizes and samples of its weight files."""
        found = hashlib.sha256()
        if self.kind == "checkpoint":
            found.update((self.path / checkpoint.MANIFEST).read_bytes())
            return found.hexdigest()
        for file in sorted(self.path.glob("*.safetensors")):
            size = file.stat().st_size
            found.update(f"{file.name} {size}".encode())
            with open(file, "rb") as data:
                for part in range(_SAMPLES):
                    data.seek(size * part // _SAMPLES)
                    found.update(data.read(_SAMPLE_BYTES))
        return found.hexdigest()

    @property
    def run(self) -> Path:
        """The run that a checkpoint belongs to."""
        return self.path.parent.parent

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer is."""
        return str(self.run / "tokenizer") if self.kind == "checkpoint" else str(self.path)

    def config(self, param_dtype: str, compute_dtype: str) -> ModelConfig:
        """The architecture; reads no weights."""
        if self.kind == "hf":
            return hf.read_config(self.path).replace(param_dtype=param_dtype, compute_dtype=compute_dtype)
        return checkpoint.read_model(self.path).replace(param_dtype=param_dtype, compute_dtype=compute_dtype)

    def params(self, config: ModelConfig, mesh: Mesh, starts: dict | None = None) -> dict:
        """The weights in ``config.execution.param_dtype``, each straight on its devices, adapters merged. Raises UserError.

        With adapters of its own the config may want its base without PiSSA's part, or quantized: then each matrix is as soon as
        it is there, so that one of them (stacked over layers) is whole on the devices at a time; all are where adapters are
        merged before. ``starts``: where PiSSA's adapters began, from a checkpoint; none: they begin here.
        """
        size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes(config)))
        with Working("weights", max(1, size >> 20), f"MiB of {self.path}") as show:
            keep = _Keeper(config.adapter, mesh, starts or {}, show)
            return merge(self._read(config, mesh, keep), unflatten(keep.starts))

    def _read(self, config: ModelConfig, mesh: Mesh, keep: "_Keeper") -> dict:
        """:meth:`params`, but for where PiSSA's adapters begin."""
        if self.kind == "hf":

            def place(path: tuple[str, ...], leaf: hf.Leaf) -> jax.Array | dict:
                return keep(path, leaf.place(leaf_sharding(path, leaf.shape, mesh)))

            dtypes = config.execution.param_dtype, config.execution.compute_dtype
            return hf.load(str(self.path), *dtypes, placement=place)[0]
        checkpoint.verify(self.path)
        if found := checkpoint.read_adapters(self.path):
            params = self._merged(*found, config, mesh)
            return jax.tree_util.tree_map_with_path(lambda path, leaf: keep(tuple(key.key for key in path), leaf), params)
        if keep.all_as_they_are:
            return restore_tree(self.path / "params", _abstract(shapes(config), mesh))
        return restore_each(self.path / "params", _abstract(shapes(config), mesh), keep)

    def adapters(self, config: ModelConfig, mesh: Mesh) -> tuple[dict, dict]:
        """The adapters of a checkpoint that holds such, of the kind that ``config.adapter`` says, and where PiSSA's began."""
        checkpoint.verify(self.path)
        adapter = present(config.adapter, "ModelConfig.adapter")
        held = merge(lora.shapes(shapes(config), adapter), lora.split(full_shapes(config))[1])
        return lora.split(restore_tree(self.path / "params", _abstract(held, mesh)))

    def _merged(self, adapter: Adapter, base: checkpoint.Base, config: ModelConfig, mesh: Mesh) -> dict:
        """The base, as it was kept beside its adapters, with them merged."""
        source = WeightSource.at(base.path)
        if not source.path.exists() or source.digest() != base.digest:
            raise UserError(
                f"{self.path} holds adapters of {base.path}, and the weights that they were trained with are no longer there "
                "(moved, deleted or trained again): put them back"
            )
        stored = checkpoint.read_model(self.path).execution.param_dtype
        beside = dataclasses.replace(config, adapter=adapter)
        adapters, starts = self.adapters(beside, mesh)
        params, out = source.params(beside.replace(param_dtype=stored), mesh, starts), shardings(shapes(config), mesh)

        def merge_in(params: dict, adapters: dict) -> dict:
            whole = lora.merged(merge(params, adapters), adapter)
            return jax.tree.map(lambda w: w.astype(config.execution.param_dtype), whole)

        # Neither codes nor a start are room for what is made of them.
        donated = 0 if (adapter.base, adapter.init) == ("param", "kaiming") else ()
        return jax.jit(merge_in, out_shardings=out, donate_argnums=donated)(params, adapters)


class _Keeper:
    """Makes each parameter what is kept of it beside adapters: called with its path and it, which is then gone if changed.

    ``starts``: by path, where PiSSA's adapters began of the kernels so far. ``show`` is told how many MiB are there.
    """

    def __init__(self, adapter: Adapter | None, mesh: Mesh, starts: dict, show: Working):
        self._adapter, self._mesh, self._given = adapter, mesh, flatten(starts)
        self._show, self._there = show, 0.0
        self.starts: dict[tuple[str, ...], jax.Array] = {}

    @property
    def all_as_they_are(self) -> bool:
        return self._adapter is None or (self._adapter.base, self._adapter.init) == ("param", "kaiming")

    def __call__(self, path: tuple[str, ...], leaf: jax.Array) -> jax.Array | dict:
        self._there += leaf.nbytes / 2**20
        self._show(self._there)
        if self._adapter is None or path[-1] != "kernel":
            return leaf
        if self._adapter.init == "pissa" and path[-2] in self._adapter.targets:
            leaf = self._residual(path[:-1], leaf)
        if self._adapter.base == "param":
            return leaf
        kept = jax.block_until_ready(self._made(path, functools.partial(quantized.quantize, base=self._adapter.base), leaf))
        leaf.delete()
        return kept

    def _residual(self, dense: tuple[str, ...], kernel: jax.Array) -> jax.Array:
        adapter = present(self._adapter, "ModelConfig.adapter")
        names = [(*dense, name) for name in lora.STARTS]
        if self._given:
            start = {path[-1]: self._given[path] for path in names}
        else:
            start = self._made(dense, functools.partial(lora.principal, rank=adapter.rank, scale=adapter.scale), kernel)
        self.starts |= {path: start[path[-1]] for path in names}
        less = jax.jit(functools.partial(lora.residual, scale=adapter.scale), out_shardings=kernel.sharding)
        left = jax.block_until_ready(less(kernel, start))
        kernel.delete()
        return left

    def _made(self, path: tuple[str, ...], function: Callable[[jax.Array], dict], leaf: jax.Array) -> dict:
        """Leaves under ``path``, each placed as its name says."""
        out = {name: leaf_sharding((*path, name), s.shape, self._mesh) for name, s in jax.eval_shape(function, leaf).items()}
        return jax.jit(function, out_shardings=out)(leaf)


def _abstract(wanted: dict, mesh: Mesh) -> dict:
    """Shapes with their shardings."""
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), wanted, shardings(wanted, mesh)
    )


def locate(name: str) -> WeightSource:
    """The source that ``name`` means. Raises UserError; a hub id is downloaded."""
    path = local(name)
    if (path / "checkpoints").is_dir():
        return _newest(path)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        if not path.is_dir():
            raise UserError(f"{path}: no such checkpoint; there are {checkpoint.steps(path.parent)}")
        held = checkpoint.hold(path)
        checkpoint.verify(path)
        return WeightSource("checkpoint", path, held)
    if (path / "config.yaml").is_file():
        raise UserError(f"{path}: a run without a checkpoint; run its training first")
    if not path.exists() and path.parts[:1] == (cfg.Run.model_fields["dir"].default,):
        raise UserError(f"{name}: no such run yet; make it first, e.g.: python scripts/train.py --config {path.name}")
    return WeightSource("hf", hf.fetch(name))


def _newest(run: Path) -> WeightSource:
    """The newest checkpoint of a run, which may be training: one that goes before it could be held is not the newest now."""
    while found := checkpoint.steps(run / "checkpoints"):
        path = run / "checkpoints" / f"{found[-1]:08d}"
        if held := checkpoint.hold(path):
            return WeightSource("checkpoint", path, held)
        time.sleep(0.05)
    cut = len(checkpoint.unfinished(run / "checkpoints"))
    raise UserError(
        f"{run}: a run without a finished checkpoint ({cut} unfinished): wait for its first (train.save_every), or run its "
        "training again"
    )
