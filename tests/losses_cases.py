"""Inputs and evaluation shared by the tests of the losses."""

import dataclasses

import jax
import jax.numpy as jnp
import losses_twin as twin
import numpy as np
import pytest

from jaxreason import losses
from jaxreason.losses.reduce import whole_step

POISONS = (1e30, float("nan"))
SIZE = 1 + len(POISONS) + twin.MASK.shape[0]


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


@pytest.fixture(autouse=True, scope="module")
def fast_compiles():
    """These tests compile hundreds of tiny operations and run each a few times."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def evaluate(loss, batches):
    """(values, metrics, gradients by logp) of a list of inputs of one structure, as numpy, stacked.

    Run as single operations under vmap, because compiling each loss would cost a hundred times the arithmetic; always
    of the same size, so that operations are compiled once for all losses and tests.
    """
    batches = batches + batches[:1] * (SIZE - len(batches))
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *batches)
    return jax.tree.map(np.asarray, jax.vmap(lambda x: value_and_grad(loss, x))(stacked))


def evaluate_one(loss, inputs):
    """(value, metrics, gradient by logp)."""
    return jax.tree.map(lambda x: x[0], evaluate(loss, [inputs]))


def value_and_grad(loss, inputs):
    """(value, metrics, gradient by logp), traceable."""

    def f(logp):
        return loss(dataclasses.replace(inputs, logp=logp))

    (value, metrics), grad = jax.value_and_grad(f, has_aux=True)(inputs.logp)
    return value, metrics, grad


def check_rules(loss, inputs):
    """Poison and split invariance; returns value and gradient of the whole batch.

    Evaluated together: the whole step, the step poisoned twice, and one microbatch a row (the others masked).
    """
    inputs = whole_step(inputs)
    if loss.select is not None and inputs.selected is None:
        inputs = dataclasses.replace(inputs, selected=loss.select(inputs))
    count = inputs.mask.shape[0]
    parts = [dataclasses.replace(inputs, mask=inputs.mask * (jnp.arange(count) == r)[:, None]) for r in range(count)]
    batches = [inputs] + [poisoned(inputs, poison) for poison in POISONS] + parts
    values, metrics, grads = evaluate(loss, batches)

    assert np.isfinite(values[0]) and np.all(np.isfinite(grads[0]))
    first = 1 + len(POISONS)
    for k in range(1, first):
        assert values[k] == values[0]
        np.testing.assert_array_equal(grads[k], grads[0])
    assert not np.any(grads[0][np.asarray(inputs.mask) == 0])
    np.testing.assert_allclose(values[first:].sum(), values[0], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(grads[first:].sum(axis=0), grads[0], atol=1e-6, rtol=1e-6)
    for key, x in metrics.items():
        kind = key[-4:]
        combined = x[first:].max() if kind == "_max" else x[first:].min() if kind == "_min" else x[first:].sum()
        np.testing.assert_allclose(combined, x[0], atol=1e-6, rtol=1e-5, err_msg=key)
    return values[0], grads[0]


def poisoned(inputs, poison):
    """``poison`` at every masked position of every per-token input."""
    dead = inputs.mask <= 0
    fixed = {"mask", "sequence_ids", "group_ids", "totals"}
    values = {k: v for k, v in vars(inputs).items() if v is not None and k not in fixed}
    return dataclasses.replace(inputs, **{k: jnp.where(dead, poison, v) for k, v in values.items()})
