"""Inputs and evaluation shared by the tests of the losses."""

import dataclasses

import jax
import jax.numpy as jnp
import losses_twin as twin
import numpy as np

from jaxreason import losses
from jaxreason.losses.reduce import whole_step

POISONS = (None, 1e30, float("nan"))


def make(kind: str, data: dict, mask=twin.MASK, ids=twin.IDS, groups=twin.GROUPS, keys=None):
    """Inputs of ``kind`` from numpy arrays; ``keys``: which of the optional ones."""
    cls = losses.SftInputs if kind == "sft" else losses.PolicyInputs
    fields = {f.name for f in dataclasses.fields(cls)}
    required = {"logp"} if kind == "sft" else {"logp", "old_logp", "advantages"}
    values = {k: jnp.asarray(v, jnp.float32) for k, v in data.items() if k in fields and (k in required or k in keys)}
    values["sequence_ids"] = None if ids is None else jnp.asarray(ids, jnp.int32)
    if kind == "policy" and groups is not None:
        values["group_ids"] = jnp.asarray(groups, jnp.int32)
    return cls(mask=jnp.asarray(mask, jnp.float32), **values)


def value_and_grad(loss, inputs):
    """(value, metrics, gradient by logp)."""

    def f(logp):
        return loss(dataclasses.replace(inputs, logp=logp))

    (value, metrics), grad = jax.value_and_grad(f, has_aux=True)(inputs.logp)
    return value, metrics, grad


def poisoned(inputs):
    """The inputs stacked over POISONS at their masked positions."""
    dead = inputs.mask <= 0
    fixed = {"mask", "sequence_ids", "group_ids", "totals"}

    def fill(poison):
        if poison is None:
            return inputs
        values = {k: v for k, v in vars(inputs).items() if v is not None and k not in fixed}
        return dataclasses.replace(inputs, **{k: jnp.where(dead, poison, v) for k, v in values.items()})

    return jax.tree.map(lambda *x: jnp.stack(x), *[fill(p) for p in POISONS])


def rows(inputs):
    """Microbatches of one row, stacked: [B, 1, T], totals repeated."""
    b = inputs.mask.shape[0]
    return jax.tree.map(lambda x: x[:, None] if jnp.ndim(x) else jnp.broadcast_to(x, (b,)), inputs)


def check_rules(loss, inputs):
    """Poison and split invariance; returns value and gradient of the whole batch.

    Run as single operations under vmap: compiling each loss would cost a hundred times the arithmetic.
    """
    run = jax.vmap(lambda x: value_and_grad(loss, x))
    values, _, grads = run(poisoned(inputs))
    assert np.isfinite(values[0]) and np.all(np.isfinite(grads[0]))
    for k in range(1, len(POISONS)):
        assert values[k] == values[0]
        np.testing.assert_array_equal(grads[k], grads[0])
    assert not np.any(np.asarray(grads[0])[np.asarray(inputs.mask) == 0])

    whole = whole_step(inputs)
    if loss.select is not None:
        whole = dataclasses.replace(whole, selected=loss.select(inputs))
    parts, metrics, part_grads = run(rows(whole))
    np.testing.assert_allclose(parts.sum(), values[0], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(part_grads[:, 0], grads[0], atol=1e-6, rtol=1e-6)
    _, whole_metrics, _ = value_and_grad(loss, inputs)
    for key, x in metrics.items():
        combined = x.max() if key.endswith("_max") else x.min() if key.endswith("_min") else x.sum()
        np.testing.assert_allclose(combined, whole_metrics[key], atol=1e-6, rtol=1e-5, err_msg=key)
    return values[0], grads[0]
