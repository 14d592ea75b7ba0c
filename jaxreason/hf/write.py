"""Writes parameters as a Hugging Face directory, all of it or none."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreason.data.directory import write_sums
from jaxreason.errors import UserError
from jaxreason.hf.card import model_card
from jaxreason.hf.config import config_to_hf, generation_to_hf
from jaxreason.hf.table import DTYPES, EMBEDDING, flatten, rows
from jaxreason.locks import Partial
from jaxreason.model import ModelConfig
from jaxreason.paths import local

_STORED = {"float32": "F32", "bfloat16": "BF16"}
_SLACK_BYTES = 64 << 20  # tokenizer, index and file system overhead in addition to the weights


def save(
    params: dict,
    config: ModelConfig,
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    tokenizer: Any = None,
    card: dict | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers opens: weights, configs, tokenizer and model card, all or nothing.

    Args:
      params: our layout, each leaf an Array or ndarray, stacked over layers.
      dtype: of the stored weights, ``float32`` or ``bfloat16``.
      tokenizer: anything with ``save_pretrained(directory)`` or ``save(directory)``; None: none is written.
      card: sections of README.md, see :func:`jaxreason.hf.card.model_card`.
      shard_bytes: above it the weights are split into files of at most this size, and an index.

    Raises: UserError if ``path`` holds anything, the disk is too small, a parameter is missing or misshapen, or
    ``config`` has no Hugging Face form.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    target = open_target(path)
    files = {
        "config.json": json.dumps(config_to_hf(config, dtype), indent=2) + "\n",
        "generation_config.json": json.dumps(generation_to_hf(config), indent=2) + "\n",
        "README.md": model_card(config, dtype, card or {}),
    }
    shards = _plan_shards(tensors(params, config), jnp.dtype(dtype).itemsize, shard_bytes)
    with all_or_nothing(target, sum(size for _, size in shards)) as directory:
        _write_weights(directory, shards, params, dtype)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            (tokenizer.save_pretrained if hasattr(tokenizer, "save_pretrained") else tokenizer.save)(str(directory))


def open_target(path: str | os.PathLike) -> Path:
    """Where an export goes. Raises UserError where something is."""
    target = local(path).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty directory; give another path or remove it")
    return target


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a Hugging Face tensor comes from: a leaf, and its layer unless the leaf has none."""

    name: str
    path: tuple[str, ...]
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]  # as Hugging Face stores it


def tensors(params: dict, config: ModelConfig) -> list[_Source]:
    """The tensors to write, layer by layer; raises where ``params`` is not a tree of this architecture."""
    leaves, layers = flatten(params), []
    before: list[_Source] = []
    after: list[_Source] = []
    for pattern, path, transposed, spec in rows(config):
        if path not in leaves:
            raise UserError(f"cannot export: parameter {'.'.join(path)} {list(spec.shape)} is missing")
        if (found := tuple(leaves.pop(path).shape)) != spec.shape:
            raise UserError(f"cannot export: parameter {'.'.join(path)} is {list(found)}, expected {list(spec.shape)}")
        if path[0] == "layers":
            shape = spec.shape[:0:-1] if transposed else spec.shape[1:]
            layers.append([_Source(pattern.format(i), path, i, transposed, shape) for i in range(config.arch.num_layers)])
        else:
            group = before if pattern == EMBEDDING else after
            group.append(_Source(pattern, path, None, transposed, spec.shape))
    if leaves:
        raise UserError(f"cannot export: parameter {'.'.join(next(iter(leaves)))} is not part of the architecture")
    return [*before, *itertools.chain.from_iterable(zip(*layers)), *after]


def _plan_shards(sources: list[_Source], itemsize: int, shard_bytes: int) -> list[tuple[list[_Source], int]]:
    """Consecutive groups of at most ``shard_bytes``, each with its bytes; a larger tensor is a group of its own."""
    shards: list[tuple[list[_Source], int]] = []
    for source in sources:
        size = math.prod(source.shape) * itemsize
        if shards and shards[-1][1] + size <= shard_bytes:
            shards[-1] = ([*shards[-1][0], source], shards[-1][1] + size)
        else:
            shards.append(([source], size))
    return shards


def _write_weights(directory: Path, shards: list[tuple[list[_Source], int]], params: dict, dtype: str) -> None:
    leaves = flatten(params)
    weight_map: dict[str, str] = {}
    for number, (sources, _) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_file(directory / file, sources, leaves, dtype)
        weight_map |= {source.name: file for source in sources}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, sources: list[_Source], leaves: dict, dtype: str) -> None:
    """A safetensors file: the header's length (u64, little endian), the header as JSON, the values in its order.

    Written here, tensor by tensor, because the library's writer takes a file's tensors all at once.
    """
    itemsize, end = jnp.dtype(dtype).itemsize, 0
    # transformers refuses a file that does not name the framework whose layout it has.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for source in sources:
        start, end = end, end + math.prod(source.shape) * itemsize
        header[source.name] = {"dtype": _STORED[dtype], "shape": source.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            out.write(to_numpy(leaves[source.path], source, dtype).view(np.uint8).data)


def to_numpy(leaf: Array | np.ndarray, source: _Source, dtype: str) -> np.ndarray:
    values = np.asarray(leaf if source.layer is None else leaf[source.layer]).astype(jnp.dtype(dtype), copy=False)
    return np.ascontiguousarray(values.T if source.transposed else values)  # a file holds memory, not strides


@contextlib.contextmanager
def all_or_nothing(target: Path, size: int) -> Iterator[Path]:
    """A directory next to ``target`` that becomes it at the end, and is removed if anything fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < size + _SLACK_BYTES:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free, but the export needs {(size + _SLACK_BYTES) / 1e9:.1f} GB; "
            "free some, or export elsewhere"
        )
    with Partial(target) as partial:
        yield partial.path
        write_sums(partial.path)
        for file in partial.path.rglob("*"):
            _sync(file)
        if target.exists():
            target.rmdir()
        partial.commit()
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
