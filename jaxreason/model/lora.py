"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the kernels of Denses, and their merge into them.

A Dense with an adapter computes y = x·W + s·(x·A)·B, with s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). DoRA
(arXiv 2402.09353) multiplies this by m / ||W + s·A·B||, the norm of each output's weights, which gets no gradient. A and B
are two thin products, so that W + s·A·B, which has the size of W, is formed only where W is merged for decoding or export, and
W itself needs no gradient.

Leaves, in the dict of a Dense, stacked over layers: lora_a [L, in, r], lora_b [L, r, out], and of DoRA magnitude [L, out];
float32 whatever W is stored in.

PiSSA (arXiv 2404.02948) begins with the r largest singular triplets: s·A·B = U_r S_r V_rᵀ, and keeps W − s·A·B in the place of
W. Where A and B began stays in the base as start_a and start_b, which have their shapes: with them the base is the model that
the run started from, and an exported adapter s·(A·B − start_a·start_b) belongs to W itself.

The embedding and the head are tables [V, D] without a Dense; of one with an adapter the rows are W + s·B·A, in a dict
``embedding_lora`` or ``head_lora`` with lora_b [V, r], zero at first, and lora_a [r, D]. Tied tables are one, with one adapter.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxreason.errors import UserError
from jaxreason.model.config import Adapter
from jaxreason.model.quantized import kernel_of

LEAVES, STARTS = ("lora_a", "lora_b", "magnitude"), ("start_a", "start_b")
TABLES = {"embedding": "embedding_lora", "head": "head_lora"}  # a table, and where its adapter is


def adapted(out: Array, x: Array, leaves: Mapping[str, Any], adapter: Adapter) -> Array:
    """``out`` = x·W [rows, out] with the adapter's part added; ``leaves``: kernel [in, out] and those of the adapter.

    Without an adapter's own leaves the part is that of PiSSA's start.
    """
    a, b = _pair(leaves)
    out = out + (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * adapter.scale
    if "magnitude" not in leaves:
        return out
    norm = column_norms(lax.stop_gradient(_sum(leaves, adapter)))
    return out * (leaves["magnitude"].astype(jnp.float32) / norm).astype(x.dtype)


def _pair(leaves: Mapping[str, Any]) -> tuple[Array, Array]:
    """A and B as they are, or as they were at PiSSA's start where there is no adapter."""
    return (leaves["lora_a"], leaves["lora_b"]) if "lora_a" in leaves else (leaves["start_a"], leaves["start_b"])


def _sum(leaves: Mapping[str, Any], adapter: Adapter) -> Array:
    """W + s·A·B in float32."""
    return kernel_of(leaves["kernel"]).astype(jnp.float32) + adapter.scale * _product(*_pair(leaves))


def _product(a: Array, b: Array) -> Array:
    """a·b in float32 at full precision, also where the device's default for float32 is less."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def column_norms(kernel: Array) -> Array:
    """||W|| over the inputs: [..., in, out] → [..., out] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2))


def merged(params: dict, adapter: Adapter | None) -> dict:
    """A tree without adapters that computes the same: each kernel with one becomes W + s·A·B, in float32, and each that is
    kept as codes becomes an array.

    ``params``: the model's, a layer's or a module's. Without an adapter it is returned as it is.
    """
    if adapter is None:
        return params
    if not params.keys().isdisjoint((*LEAVES, *STARTS)):
        kernel = _sum(params, adapter)
        if "magnitude" in params:
            kernel = kernel * (params["magnitude"].astype(jnp.float32) / column_norms(kernel))[..., None, :]
        rest = {name: leaf for name, leaf in params.items() if name not in (*LEAVES, *STARTS)}
        return {**rest, "kernel": kernel}

    def one(name: str, child: Any) -> Any:
        if leaves := params.get(TABLES.get(name, "")):
            return child.astype(jnp.float32) + adapter.scale * _product(leaves["lora_b"], leaves["lora_a"])
        return kernel_of(child) if name == "kernel" else merged(child, adapter) if isinstance(child, dict) else child

    return {name: one(name, child) for name, child in params.items() if name not in TABLES.values()}


def shapes(params: dict, adapter: Adapter) -> dict:
    """The adapters' leaves for the model's own parameters, given as arrays or shapes: a tree with nothing else in it."""
    found: dict[str, Any] = {}
    for name, child in params.items():
        if name in TABLES and name in adapter.targets:
            (vocab, width), rank = child.shape, adapter.rank
            found[TABLES[name]] = _floats({"lora_a": (rank, width), "lora_b": (vocab, rank)})
        elif isinstance(child, dict) and name in adapter.targets and "kernel" in child:
            found[name] = _leaves(child["kernel"].shape, adapter)
        elif isinstance(child, dict) and (inner := shapes(child, adapter)):
            found[name] = inner
    return found


def _leaves(kernel: tuple[int, ...], adapter: Adapter) -> dict[str, jax.ShapeDtypeStruct]:
    layers, width, features = kernel
    sizes: dict[str, tuple[int, ...]] = {"lora_a": (layers, width, adapter.rank), "lora_b": (layers, adapter.rank, features)}
    if adapter.kind == "dora":
        sizes["magnitude"] = (layers, features)
    return _floats(sizes)


def _floats(sizes: dict[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {leaf: jax.ShapeDtypeStruct(size, jnp.float32) for leaf, size in sizes.items()}


def check(params: dict, adapter: Adapter) -> None:
    """Raises UserError for a head that is the embedding, and for a rank that is more than a matrix's own.

    ``params``: the model's own, as arrays or shapes.
    """
    if "head" in adapter.targets and "head" not in params:
        raise UserError(
            "lora.targets: this model's head is its embedding (tied tables), which have one adapter: name embedding, not head"
        )
    keys = {tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    targets = {path[-2] if path[-1] == "kernel" else path[-1]: leaf for path, leaf in keys.items()}
    for name in adapter.targets:
        if name in targets and adapter.rank > (least := min(targets[name].shape[-2:])):
            width, features = targets[name].shape[-2:]
            raise UserError(
                f"lora.rank {adapter.rank}: {name} is a matrix of {width} x {features}, whose own rank is at most {least}; "
                f"use a smaller rank, or leave {name} out of lora.targets"
            )


def init(params: dict, adapter: Adapter, key: Array) -> dict:
    """A uniform in ±1/sqrt(in) (Kaiming's with a = sqrt 5, as in the papers' code and PEFT), B zero; magnitude one.

    Each leaf is drawn from its own number in the tree. :func:`with_magnitudes` gives DoRA's magnitude its value. Of a table A is
    drawn in the same way; PEFT draws that of an embedding from N(0, 1), by which it would learn sqrt(3 D) times as fast.
    """
    leaves, tree = jax.tree.flatten_with_path(shapes(params, adapter))

    def one(number: int, name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        if name != "lora_a":
            return jnp.full(leaf.shape, 1.0 if name == "magnitude" else 0.0, leaf.dtype)
        bound = 1.0 / math.sqrt(leaf.shape[1])
        return jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, -bound, bound)

    return jax.tree.unflatten(tree, [one(i, path[-1].key, leaf) for i, (path, leaf) in enumerate(leaves)])


def with_magnitudes(adapters: dict, params: dict) -> dict:
    """DoRA's magnitudes at the norms of the kernels that they belong to; other leaves, and other trees, as they are."""
    if "magnitude" in adapters:
        return {**adapters, "magnitude": column_norms(kernel_of(params["kernel"]))}

    def one(name: str, child: Any) -> Any:
        return with_magnitudes(child, params[name]) if isinstance(child, dict) and name in params else child

    return {name: one(name, child) for name, child in adapters.items()}


def principal(kernel: Array, rank: int, scale: float) -> dict[str, Array]:
    """PiSSA's start: start_a = U_r (S_r / s)^½ [..., in, r] and start_b = (S_r / s)^½ V_rᵀ [..., r, out], in float32.

    The vectors of the shorter side are those of W·Wᵀ, the other side's are made of them and W: on a GPU a minute instead of an
    hour for a model's matrices. What the squared matrix loses is no error, since the base is W less this very product.
    Stacked layers are taken one after another.
    """
    if kernel.ndim > 2:
        return lax.map(lambda w: principal(w, rank, scale), kernel)
    if kernel.shape[0] > kernel.shape[1]:
        turned = principal(kernel.T, rank, scale)
        return {"start_a": turned["start_b"].T, "start_b": turned["start_a"].T}
    w = kernel.astype(jnp.float32)
    vectors = jnp.linalg.eigh(_product(w, w.T))[1][:, ::-1][:, :rank]  # eigh sorts upwards
    rows = _product(vectors.T, w)  # S_r V_rᵀ
    values = jnp.linalg.norm(rows, axis=1)
    some = jnp.where(values == 0, 1, values)
    return {"start_a": vectors * jnp.sqrt(values / scale), "start_b": rows / jnp.sqrt(some * scale)[:, None]}


def residual(kernel: Array, start: Mapping[str, Array], scale: float) -> Array:
    """W − s·start_a·start_b in W's dtype."""
    return (kernel.astype(jnp.float32) - scale * _product(start["start_a"], start["start_b"])).astype(kernel.dtype)


def without_principal(params: dict, adapter: Adapter) -> dict:
    """The model's own parameters with the kernels of all targets made their residual, beside start_a and start_b."""

    def one(name: str, child: Any) -> Any:
        if not isinstance(child, dict):
            return child
        if name not in adapter.targets or "kernel" not in child:
            return without_principal(child, adapter)
        start = principal(child["kernel"], adapter.rank, adapter.scale)
        return {**child, "kernel": residual(child["kernel"], start, adapter.scale), **start}

    return {name: one(name, child) for name, child in params.items()}


def split(held: dict) -> tuple[dict, dict]:
    """What a checkpoint holds as (the adapters, where PiSSA's began), or a base as (the rest, the same)."""
    parts: tuple[dict, dict] = {}, {}
    for name, child in held.items():
        both: tuple[Any, Any] = split(child) if isinstance(child, dict) else ({}, child) if name in STARTS else (child, {})
        for part, inner in zip(parts, both, strict=True):
            if not isinstance(inner, dict) or inner:
                part[name] = inner
    return parts


def as_adapters(starts: dict) -> dict:
    """Adapters at PiSSA's start: copies of start_a and start_b by the names of the leaves that train."""
    names = dict(zip(STARTS, LEAVES, strict=False))
    copied = {name: as_adapters(child) if isinstance(child, dict) else jnp.copy(child) for name, child in starts.items()}
    return {names.get(name, name): child for name, child in copied.items()}


def on_the_model(adapters: dict, starts: dict) -> dict:
    """Adapters of rank 2r on the weights as they were before PiSSA: A·B − start_a·start_b = [A, start_a]·[B; −start_b]."""
    if "lora_a" not in adapters:
        return {name: on_the_model(child, starts[name]) for name, child in adapters.items()}
    return {
        "lora_a": jnp.concatenate([adapters["lora_a"], starts["start_a"]], axis=-1),
        "lora_b": jnp.concatenate([adapters["lora_b"], -starts["start_b"]], axis=-2),
    }
