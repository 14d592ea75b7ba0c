"""Inputs and evaluation shared by the tests of the losses."""

import dataclasses

import jax
import jax.numpy as jnp
import losses_twin as twin
import numpy as np

from jaxreason import losses
from jaxreason.losses.reduce import whole_step

POISONS = (1e30, float("nan"))
ROWS = twin.MASK.shape[0]
# Every set of rows that can be a microbatch, the single rows first.
SUBSETS = sorted((np.array([k >> r & 1 for r in range(ROWS)]) for k in range(1, 2**ROWS)), key=np.sum)
SIZE = 1 + len(POISONS) + len(SUBSETS)


def make(kind: str, data: dict, mask=twin.MASK, ids=twin.IDS, groups=twin.GROUPS, keys=None):
    """Inputs of ``kind`` from numpy arrays; ``keys``: which of the optional ones."""
    cls = losses.SftInputs if kind == "sft" else losses.PolicyInputs
    fields = {f.name for f in dataclasses.fields(cls)}
    required = {"logp"} if kind == "sft" else {"logp", "old_logp", "advantages"}
    values = {k: jnp.asarray(v, jnp.float32) for k, v in data.items() if k in fields and (k in required or k in keys)}
    values["sequence_ids"] = None if ids is None else jnp.asarray(ids, jnp.int32)
    if kind == "policy" and groups is not None:
        values["group_ids"] = jnp.asarray(groups, jnp.int32)
    if kind == "policy":
        values["extras"] = {k: jnp.asarray(data[k], jnp.float32) for k in twin.EXTRAS if k in keys}
    return cls(mask=jnp.asarray(mask, jnp.float32), **values)


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

    Evaluated together: the whole step, the step poisoned twice, and every set of rows as a microbatch (the others
    masked). Where the result of each set is the sum of its rows' results, any split adds up to the whole.
    """
    inputs = whole_step(inputs)
    if loss.select is not None and inputs.selected is None:
        inputs = dataclasses.replace(inputs, selected=loss.select(inputs))
    parts = [dataclasses.replace(inputs, mask=inputs.mask * rows[:, None]) for rows in SUBSETS]
    batches = [inputs] + [poisoned(inputs, poison) for poison in POISONS] + parts
    values, metrics, grads = evaluate(loss, batches)

    assert np.isfinite(values[0]) and np.all(np.isfinite(grads[0]))
    first = 1 + len(POISONS)
    for k in range(1, first):
        assert values[k] == values[0]
        np.testing.assert_array_equal(grads[k], grads[0])
        for key, x in metrics.items():
            assert x[k] == x[0], key
    assert not np.any(grads[0][np.asarray(inputs.mask) == 0])
    np.testing.assert_array_equal(values[-1], values[0])  # the last set is the whole
    for k, rows in enumerate(SUBSETS):
        singles = first + np.nonzero(rows)[0]  # the single rows come first, in their order
        np.testing.assert_allclose(values[singles].sum(), values[first + k], atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(grads[singles].sum(axis=0), grads[first + k], atol=1e-6, rtol=1e-6)
        for key, x in metrics.items():
            combine = {"_max": np.max, "_min": np.min}.get(key[-4:], np.sum)
            np.testing.assert_allclose(combine(x[singles]), x[first + k], atol=1e-6, rtol=1e-5, err_msg=key)
    return values[0], grads[0]


def poisoned(inputs, poison):
    """``poison`` at every masked position of every per-token input."""
    dead = inputs.mask <= 0
    fixed = {"mask", "sequence_ids", "group_ids", "totals", "extras"}
    values = {k: v for k, v in vars(inputs).items() if v is not None and k not in fixed}
    extras = {k: jnp.where(dead, poison, v) for k, v in inputs.extras.items()}
    return dataclasses.replace(inputs, extras=extras, **{k: jnp.where(dead, poison, v) for k, v in values.items()})
