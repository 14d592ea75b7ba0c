"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the kernels of Denses, and their merge into them.

A Dense with an adapter computes y = x·W + s·(x·A)·B, with s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). DoRA
(arXiv 2402.09353) multiplies this by m / ||W + s·A·B||, the norm of each output's weights, which gets no gradient. A and B
are two thin products, so that W + s·A·B, which has the size of W, is formed only where W is merged for decoding or export, and
W itself needs no gradient.

Leaves, in the dict of a Dense, stacked over layers: lora_a [L, in, r], lora_b [L, r, out], and of DoRA magnitude [L, out];
float32 whatever W is stored in.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxreason.errors import UserError
from jaxreason.model.config import Adapter
from jaxreason.model.quantized import kernel_of

LEAVES = ("lora_a", "lora_b", "magnitude")


def adapted(out: Array, x: Array, leaves: Mapping[str, Any], adapter: Adapter) -> Array:
    """``out`` = x·W [rows, out] with the adapter's part added; ``leaves``: kernel [in, out] and those of the adapter."""
    out = out + (x @ leaves["lora_a"].astype(x.dtype)) @ leaves["lora_b"].astype(x.dtype) * adapter.scale
    if adapter.kind == "lora":
        return out
    norm = column_norms(jax.lax.stop_gradient(_sum(leaves, adapter)))
    return out * (leaves["magnitude"].astype(jnp.float32) / norm).astype(x.dtype)


def _sum(leaves: Mapping[str, Any], adapter: Adapter) -> Array:
    """W + s·A·B in float32; A·B at full precision, also where the device's default for float32 is less."""
    a, b = (leaves[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
    return kernel_of(leaves["kernel"]).astype(jnp.float32) + adapter.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


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
    if "lora_a" not in params:
        return {
            name: kernel_of(child) if name == "kernel" else merged(child, adapter) if isinstance(child, dict) else child
            for name, child in params.items()
        }
    kernel = _sum(params, adapter)
    if adapter.kind == "dora":
        kernel = kernel * (params["magnitude"].astype(jnp.float32) / column_norms(kernel))[..., None, :]
    rest = {name: leaf for name, leaf in params.items() if name not in LEAVES}
    return {**rest, "kernel": kernel}


def shapes(params: dict, adapter: Adapter) -> dict:
    """The adapters' leaves for the model's own parameters, given as arrays or shapes: a tree with nothing else in it.

    Raises UserError where the rank is more than a kernel's own, for a target that the model lacks.
    """
    found: dict[str, Any] = {}
    for name, child in params.items():
        if not isinstance(child, dict):
            continue
        if name in adapter.targets and "kernel" in child:
            found[name] = _leaves(name, child["kernel"].shape, adapter)
        elif inner := shapes(child, adapter):
            found[name] = inner
    return found


def _leaves(name: str, kernel: tuple[int, ...], adapter: Adapter) -> dict[str, jax.ShapeDtypeStruct]:
    layers, width, features = kernel
    if adapter.rank > min(width, features):
        raise UserError(
            f"lora.rank {adapter.rank}: {name} is a matrix of {width} x {features}, whose own rank is at most "
            f"{min(width, features)}; use a smaller rank, or leave {name} out of lora.targets"
        )
    sizes: dict[str, tuple[int, ...]] = {"lora_a": (layers, width, adapter.rank), "lora_b": (layers, adapter.rank, features)}
    if adapter.kind == "dora":
        sizes["magnitude"] = (layers, features)
    return {leaf: jax.ShapeDtypeStruct(size, jnp.float32) for leaf, size in sizes.items()}


def init(params: dict, adapter: Adapter, key: Array) -> dict:
    """A uniform in ±1/sqrt(in) (Kaiming's with a = sqrt 5, as in the papers' code and PEFT), B zero; magnitude one.

    Each leaf is drawn from its own number in the tree. :func:`with_magnitudes` gives DoRA's magnitude its value.
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
    return {name: with_magnitudes(child, params[name]) if isinstance(child, dict) else child for name, child in adapters.items()}
