"""Matrices in 8 or 4 bits a weight, for a base that never trains (QLoRA, arXiv 2305.14314).

A kernel [..., in, out] is cut into blocks of 64 inputs of one output, and a block is kept as its largest magnitude and one code
a weight:

    int8   weight = code / 127 · absmax, code in -127…127: 8.5 bits a weight
    nf4    weight = NF4[code] · absmax, code in 0…15, two in a byte (the even input in the low half): 4.13 bits a weight

NF4's values are quantiles of a normal distribution (:data:`NF4`). Its absmax is quantized again ("double quantization"): over
256 outputs it is lowest + code · step with a code of 8 bits. The paper subtracts the mean of a whole matrix and keeps 8-bit
floats. Absmaxes of 256 neighbours differ little, so that their range itself is finer; and a largest and a smallest value are
the same in whatever order devices find them, so that a base is the same bits on every mesh and at every restart.

Leaves, in the place of the kernel: codes int8 [..., in, out] and absmax float32 [..., in/64, out]; of nf4 codes uint8
[..., in/2, out], absmax uint8 [..., in/64, out], lowest and step float32 [..., in/64, out/256]. Where 64 (256) does not divide,
a block is the largest common divisor. All axes stay those of the kernel, so that they are sharded and scanned as it is.

A library (qwix) would wrap the modules and keep its own records in their variables; these params are plain dicts that the layer
scan, the shardings and the merge of adapters read, and all that they need is the two functions below.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxreason.errors import UserError

BLOCK, GROUP = 64, 256  # inputs that share an absmax; absmaxes that share lowest and step
_LEAST = 16  # inputs of a block, below which its absmax weighs more than its codes

# The 2^4 values of NormalFloat: quantiles of N(0, 1) at 8 levels from 1/2 up and at 7 from 1/2 down, evenly spaced in
# probability up to 1 - (1/30 + 1/32) / 2, over the largest; 0 is among them (arXiv 2305.14314, §3 and appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BETWEEN = tuple((a + b) / 2 for a, b in itertools.pairwise(NF4))

Stored = Array | Mapping[str, Array]  # a kernel, or the leaves that it is kept as


@functools.partial(jax.jit, static_argnames="base")
def quantize(kernel: Array, base: Literal["int8", "nf4"]) -> dict[str, Array]:
    """The leaves that a kernel [..., in, out] is kept as; stacked layers one after another, in one layer's float32."""
    if kernel.ndim > 2:
        return lax.map(lambda w: quantize(w, base), kernel)
    width, features = kernel.shape
    blocks = kernel.astype(jnp.float32).reshape(-1, math.gcd(width, BLOCK), features)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    unit = (blocks / jnp.where(absmax == 0, 1, absmax)[:, None]).reshape(width, features)
    if base == "int8":
        return {"codes": jnp.round(unit * 127).astype(jnp.int8), "absmax": absmax}
    codes = jnp.sum(unit[..., None] > jnp.array(_BETWEEN, jnp.float32)[None, None], axis=-1, dtype=jnp.uint8)
    pairs = codes.reshape(-1, 2, features)
    groups = absmax.reshape(len(absmax), -1, math.gcd(features, GROUP))
    lowest, highest = jnp.min(groups, axis=2), jnp.max(groups, axis=2)
    step = (highest - lowest) / 255
    scaled = (groups - lowest[..., None]) / jnp.where(step == 0, 1, step)[..., None]
    again = jnp.round(scaled).astype(jnp.uint8).reshape(absmax.shape)
    return {"codes": pairs[:, 0] | pairs[:, 1] << 4, "absmax": again, "lowest": lowest, "step": step}


def kernel_of(stored: Stored) -> Array:
    """The kernel [..., in, out] that is kept as ``stored``, in float32; of an array itself, in its own dtype."""
    if not isinstance(stored, Mapping):
        return stored
    codes, absmax = stored["codes"], stored["absmax"]
    *stack, rows, features = codes.shape
    if "step" not in stored:
        values = codes.astype(jnp.float32) / 127
    else:
        halves = jnp.array([0, 4], jnp.uint8).reshape(*[1] * (len(stack) + 1), 2, 1)
        rows *= 2
        picked = (codes[..., None, :] >> halves & 15).reshape(*stack, rows, features)
        values = jnp.array(NF4, jnp.float32).at[picked].get(mode="promise_in_bounds")
        lowest, step = stored["lowest"], stored["step"]
        groups = absmax.astype(jnp.float32).reshape(*lowest.shape, features // lowest.shape[-1])
        absmax = (lowest[..., None] + groups * step[..., None]).reshape(absmax.shape)
    blocks = values.reshape(*absmax.shape[:-1], rows // absmax.shape[-2], features) * absmax[..., None, :]
    return blocks.reshape(*stack, rows, features)


def product(x: Array, stored: Mapping[str, Array], scanned: bool) -> Array:
    """x [rows, in] · W in x's dtype, W made from its leaves here and, for the gradient of x, once more.

    So no pass keeps more of W than one layer's. ``scanned``: by a loop, which keeps the compiler from sharing the two.
    """

    def times(x: Array, stored: Mapping[str, Array]) -> Array:
        return x @ kernel_of(stored).astype(x.dtype)

    return jax.checkpoint(times, prevent_cse=not scanned)(x, stored)


def map_kernels(function: Callable[[Any], Any], params: dict) -> dict:
    """The same tree with each kernel replaced by what ``function`` makes of it."""
    return {
        name: function(child) if name == "kernel" else map_kernels(function, child) if isinstance(child, dict) else child
        for name, child in params.items()
    }


def map_plain(function: Callable[[Any], Any], params: dict) -> dict:
    """The same tree with ``function`` of every leaf that is not one of a quantized kernel's, whose dtypes are its format."""

    def one(path: tuple, leaf: Any) -> Any:
        return leaf if [key.key for key in path[-2:-1]] == ["kernel"] else function(leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def check(params: dict, base: str) -> None:
    """Raises UserError for a matrix whose inputs are not cut into blocks. ``params``: the model's, unquantized."""
    for name, child in params.items():
        if isinstance(child, dict) and "kernel" in child:
            width = child["kernel"].shape[-2]
            if math.gcd(width, BLOCK) < _LEAST:
                raise UserError(
                    f"lora.base {base}: {name} has {width} inputs, which blocks of {BLOCK}, or at least of {_LEAST}, do not "
                    "divide; use lora.base=param"
                )
        elif isinstance(child, dict):
            check(child, base)
