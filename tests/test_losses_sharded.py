"""Every named loss over eight devices: the same value, metrics and gradient as on one, with unequal sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import losses_cases as cases
import losses_twin as twin
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason import losses
from jaxreason.losses.inputs import OPTIONAL_INPUTS
from jaxreason.losses.reduce import whole_step

# Axes that no named loss sets by itself.
EXTRA = {
    "grpo by prompt": ("grpo", {"reduce": "prompt-mean"}),
    "grpo with k3": ("grpo", {"kl_coef": 0.1}),
    "dapo with icepop": ("dapo", {"correction": "icepop"}),
    "dapo with geo_rs": ("dapo", {"correction": "geo_rs", "correction_min": 0.5, "correction_max": 1.5}),
    "nll by sequence": ("nll", {"reduce": "seq-mean-token-mean"}),
}


def eight_rows(kind: str):
    """Two different batches of four rows, sequences and prompts of their own: one to seven tokens each."""
    halves = [twin.arrays(seed) for seed in (0, 1)]
    data = {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}
    mask = np.concatenate([twin.MASK, twin.MASK[:, ::-1]])
    ids = np.concatenate([twin.IDS, twin.IDS[:, ::-1] + 100])
    groups = np.concatenate([twin.GROUPS, twin.GROUPS[:, ::-1] + 2])
    return whole_step(cases.make(kind, data, mask, ids, groups, keys={*OPTIONAL_INPUTS[kind], *twin.EXTRAS}))


def step_inputs(loss, inputs):
    if loss.select is None:
        return inputs
    return dataclasses.replace(inputs, selected=loss.select(inputs, jax.random.key(3)))


@pytest.mark.parametrize("kind", ["policy", "sft"])
def test_every_loss_is_the_same_over_eight_devices(kind):
    # Those that distil read the log-probs for an nll or a KL alone; the rest of their gradient is tests/test_frozen.py's and
    # tests/test_distillation.py's.
    named = {name: (name, {"nll_coef": 0.5} if "nll_coef" in losses.defaults(name) else {}) for name in losses.names(kind)}
    named |= {"distill": ("distill", {"kl_coef": 0.1})} if kind == "policy" else {}
    found = {label: losses.get(name, **options) for label, (name, options) in (named | EXTRA).items()
             if name in losses.names(kind)}  # fmt: skip
    inputs = eight_rows(kind)
    prepared = {label: step_inputs(loss, inputs) for label, loss in found.items()}

    @jax.jit
    def everything(prepared):
        return {label: cases.value_and_grad(loss, prepared[label]) for label, loss in found.items()}

    mesh = jax.make_mesh((8,), ("data",))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    split = jax.tree.map(lambda x: jax.device_put(x, rows if jnp.ndim(x) else whole), prepared)
    one, many = everything(prepared), everything(split)
    for label in found:
        value, metrics, grad = many[label]
        assert {s.data.shape for s in split[label].logp.addressable_shards} == {(1, 7)}
        assert np.any(one[label][2]), label
        np.testing.assert_allclose(value, one[label][0], rtol=1e-6, atol=1e-6, err_msg=label)
        np.testing.assert_allclose(grad, one[label][2], rtol=1e-6, atol=1e-6, err_msg=label)
        for key, metric in metrics.items():
            np.testing.assert_allclose(metric, one[label][1][key], rtol=1e-5, atol=1e-6, err_msg=f"{label} {key}")
