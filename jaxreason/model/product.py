"""The matrix product of decoding: few rows by a weight, or by a cache of keys, that is stored [out, in]."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

_FEW = range(2, 65)


def times_transposed(x: Array, weight: Array, dtype: DTypeLike | None = None) -> Array:
    """x [..., rows, in] · weight [..., out, in]ᵀ → [..., rows, out], accumulated and returned in ``dtype`` (None: x's own).

    On a CPU XLA packs the right operand of every product, which for few rows costs as much as the product. There the
    weight goes left and the rows, transposed, right; the barriers keep the simplifier from turning that around.
    Measured on two CPU cores at 16 rows by five shapes of a 135M model: 1.45 to 1.6 times faster; from 64 rows on equal.
    The same holds for attention's scores over a cache, a few query heads by C keys: 1.2 times at C = 128, 2.2 at 512.
    """

    def plain(x: Array, weight: Array) -> Array:
        return jnp.einsum("...bi,...oi->...bo", x, weight, preferred_element_type=dtype)

    def weight_first(x: Array, weight: Array) -> Array:
        column = lax.optimization_barrier(x.mT)
        return lax.optimization_barrier(jnp.matmul(weight, column, preferred_element_type=dtype)).mT

    if x.shape[-2] not in _FEW:
        return plain(x, weight)
    return lax.platform_dependent(x, weight, cpu=weight_first, default=plain)
