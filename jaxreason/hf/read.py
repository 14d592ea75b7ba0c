"""Reads a Hugging Face directory into our parameters, tensor by tensor or shard by shard."""

import dataclasses
import gc
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from jaxreason.data.directory import check_sums, find, read_json
from jaxreason.errors import UserError
from jaxreason.hf.config import config_from_hf
from jaxreason.hf.hub import fetch
from jaxreason.hf.table import DTYPES, EMBEDDING, HEAD, rows, unflatten
from jaxreason.model import ModelConfig, family_of

_INDEX = "model.safetensors.index.json"
_BUFFER = "rotary_emb.inv_freq"  # old checkpoints store what rope.py computes
_MAPPED_BYTES = 32 << 20  # of a file at once, where it holds float32
_FLOATS = {"F64", "F32", "F16", "BF16"}

Placement = Callable[[tuple[str, ...], "Leaf"], Array | dict]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters, still in its files; ``read`` touches only what ``index`` covers."""

    shape: tuple[int, ...]
    dtype: Any
    tensors: tuple["_Tensor", ...]  # one a layer, or a single one
    stacked: bool
    transposed: bool

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Values at ``index``, one contiguous slice an axis, in ``dtype``."""
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)]
        out = np.empty([part.stop - part.start for part in bounds], self.dtype)
        pairs: Iterable[tuple[np.ndarray, _Tensor]]
        if self.stacked:
            pairs, bounds = zip(out, self.tensors[bounds[0]]), bounds[1:]
        else:
            pairs = [(out, self.tensors[0])]
        there = tuple(reversed(bounds)) if self.transposed else tuple(bounds)
        for target, tensor in pairs:
            tensor.read_into(target.T if self.transposed else target, there)
        return out

    def read_all(self) -> np.ndarray:
        """All of it."""
        return self.read(tuple(slice(0, size) for size in self.shape))

    def place(self, sharding: Sharding) -> Array:
        """All of it, split over this process's devices; the host holds one shard at a time.

        (``jax.make_array_from_callback`` makes the shards of all devices before it copies the first.)
        """
        places: dict[tuple, list] = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            assert index is not None  # these devices are this process's own
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
            places.setdefault(bounds, []).append(device)
        copies = []
        for bounds, devices in places.items():
            copies += _put(self.read(tuple(slice(*part) for part in bounds)), devices)
        return jax.make_array_from_single_device_arrays(self.shape, sharding, copies)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file, unread."""

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each read: the pages that it mapped are let go before others are touched.
        with _open(self.file) as file:
            return file.get_slice(self.name)[index]

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Some rows at a time: a few columns of a large table are on all of its pages."""
        step = max(1, _MAPPED_BYTES * self.shape[0] // (4 * math.prod(self.shape)))
        start, stop = index[0].start, index[0].stop
        for row in range(start, stop, step):
            part = slice(row, min(row + step, stop))
            values = out[row - start : part.stop - start]
            values[...] = self.read((part, *index[1:]))
            if not _finite(values):
                raise UserError(f"{self.file}: {self.name} holds NaN or infinite values near row {row}; the weights are damaged")


def _finite(values: np.ndarray) -> bool:
    if values.dtype.itemsize == 2:  # bfloat16, which numpy's own test widens first: ten times as slow
        return not ((values.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())


def load(
    path: str | os.PathLike,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    placement: Placement | None = None,
) -> tuple[dict, ModelConfig]:
    """Parameters and architecture of a Hugging Face directory or hub id.

    Args:
      path: directory with config.json and safetensors, or OWNER/NAME on the hub (downloaded only if no such directory).
      param_dtype, compute_dtype: ``float32`` or ``bfloat16``; weights are cast to the first as they are read.
      placement: ``(path, leaf) -> Array`` puts one parameter on devices, e.g. by :meth:`Leaf.place`, or makes several of
        it; None: on the default one.

    Raises: UserError naming the file and the tensor or key for anything missing, extra, misshapen, cut short, or beyond
    the model.
    """
    for key, value in (("param_dtype", param_dtype), ("compute_dtype", compute_dtype)):
        if value not in DTYPES:
            raise UserError(f"{key} is {value!r}; it is one of {', '.join(DTYPES)}")
    directory = fetch(path)
    config = read_config(directory).replace(param_dtype=param_dtype, compute_dtype=compute_dtype)
    if jax.process_index() == 0:  # of several processes the others need not read every file too
        check_sums(directory, lambda name: name.endswith(".safetensors") or name == _INDEX)
    tensors = _read_headers(directory)
    placement = placement or _place_whole
    leaves = _match(tensors, config, directory)
    return unflatten({path: placement(path, leaf) for path, leaf in leaves.items()}), config


def read_config(directory: Path) -> ModelConfig:
    """The architecture in ``config.json``, with the stop ids of ``generation_config.json`` where that exists."""
    check_sums(directory, lambda name: name in ("config.json", "generation_config.json"))
    where = find(directory, "config.json")
    if where is None:
        raise UserError(f"{directory / 'config.json'}: no such file; a Hugging Face directory has one next to its weights")
    generation = find(directory, "generation_config.json")
    return config_from_hf(read_json(where), str(where), read_json(generation) if generation else None)


def stored_dtype(directory: Path) -> str:
    """The narrowest of float32 and bfloat16 that holds every weight of the directory exactly (float64 apart)."""
    kinds = {tensor.kind for name, tensor in _read_headers(directory).items() if not name.endswith(_BUFFER)}
    return "bfloat16" if kinds == {"BF16"} else "float32"


def _place_whole(_: tuple[str, ...], leaf: Leaf) -> Array:
    return _put(leaf.read_all(), [None])[0]


def _put(values: np.ndarray, devices: list) -> list[Array]:
    """A copy on each device; None: the default one."""
    # Waited for, since a copy under way keeps the host's array alive together with the next one; and jax lets go of what it has
    # copied only when Python collects garbage.
    copies = jax.block_until_ready([jax.device_put(values, device) for device in devices])
    gc.collect(0)
    return copies


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "np")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, though the checkpoint needs it; download it again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); download or export it again") from None


def _read_headers(directory: Path) -> dict[str, _Tensor]:
    """Every tensor of the directory by name, none of them read."""
    weight_map: dict[str, str] = {}
    if single := find(directory, "model.safetensors"):
        files = [single]
    elif index := find(directory, _INDEX):
        weight_map = read_json(index).get("weight_map") or {}
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map; download or export it again")
        files = [_shard(directory, name) for name in sorted(set(map(str, weight_map.values())))]
    elif pickled := sorted(file.name for file in directory.glob("*.bin")):
        raise UserError(
            f"{directory} has {pickled[0]} but no safetensors; pickles run code when opened and are never read. "
            "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    else:
        raise UserError(
            f"{directory} has neither model.safetensors nor model.safetensors.index.json; give a Hugging Face "
            "directory whose weights are stored as safetensors"
        )
    found = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no dict)
                if weight_map and weight_map.get(name) != file.name:
                    said = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                    raise UserError(f"{file} has {name}, which the index puts {said}; download or export all of it again")
                view = handle.get_slice(name)
                found[name] = _Tensor(name, file, tuple(view.get_shape()), view.get_dtype())
    if missing := sorted(set(weight_map) - set(found)):
        raise UserError(
            f"{directory / weight_map[missing[0]]} lacks {missing[0]}, which the index puts there; download or export it again"
        )
    return found


def _shard(directory: Path, name: str) -> Path:
    if file := find(directory, name):
        return file
    raise UserError(f"{directory / name}: no such file, though the checkpoint needs it; download it again")


def _match(tensors: dict[str, _Tensor], config: ModelConfig, directory: Path) -> dict[tuple[str, ...], Leaf]:
    """Our leaves and the tensors that make them; every tensor is used, known to be redundant, or an error."""
    left, leaves = dict(tensors), {}
    for pattern, path, transposed, spec in rows(config):
        stacked = path[0] == "layers"
        names = [pattern.format(i) for i in range(config.arch.num_layers)] if stacked else [pattern]
        shape = spec.shape[1:] if stacked else spec.shape
        parts = tuple(_expect(left, name, shape[::-1] if transposed else shape, directory) for name in names)
        leaves[path] = Leaf(spec.shape, spec.dtype, parts, stacked, transposed)
    if config.arch.tie_embeddings and HEAD in left:
        _check_tied(left.pop(HEAD), tensors[EMBEDDING])
    if extra := sorted(name for name in left if not name.endswith(_BUFFER)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{left[extra[0]].file} has {extra[0]}{more}, which {directory / 'config.json'} does not describe: check "
            f"{', '.join(['num_hidden_layers', *family_of(config).hf.flags])} there, or give a plain "
            f"{family_of(config).hf.architecture} (merge adapters first)"
        )
    return leaves


def _expect(left: dict[str, _Tensor], name: str, shape: tuple[int, ...], directory: Path) -> _Tensor:
    tensor = left.pop(name, None)
    if tensor is None:
        hint = "; set tie_word_embeddings if the head is the embedding" if name == HEAD else ""
        raise UserError(f"{directory}: tensor {name} {list(shape)} is in none of the safetensors files{hint}")
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: {name} is {list(tensor.shape)}, but {directory / 'config.json'} makes it {list(shape)}"
        )
    if tensor.kind not in _FLOATS:
        raise UserError(f"{tensor.file}: {name} is stored as {tensor.kind}; give the unquantized checkpoint")
    return tensor


def _check_tied(head: _Tensor, embedding: _Tensor) -> None:
    """A head whose config ties it must be the embedding: otherwise one of the two would be dropped without a word."""
    count, chunk = head.shape[0], 8192  # rows at a time: the tables are the largest tensors of a small model
    parts = [(slice(i, min(i + chunk, count)), slice(None)) for i in range(0, count, chunk)]
    if head.shape != embedding.shape or not all(np.array_equal(head.read(p), embedding.read(p)) for p in parts):
        raise UserError(
            f"{head.file}: {head.name} differs from {embedding.name}, but config.json says tie_word_embeddings true; "
            "set it to false, or remove the tensor"
        )
