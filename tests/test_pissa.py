"""PiSSA: the start against numpy's singular values, and runs that begin with it, resume, open and leave as plain adapters."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import final_params, grpo_words, sft_words
from test_lora import CONFIG, NLL, PARAMS, UNPACKED, base, config_of, init, logits, moved, on, train  # noqa: F401

from jaxreason import cli, hf, losses, model
from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.model import Adapter, lora
from jaxreason.model.quantized import kernel_of
from jaxreason.sharding import make_mesh, shardings
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.step import BASE, make_gradient
from jaxreason.types import merge
from jaxreason.weights import locate


def pissa_of(form: str = "param"):
    config = config_of(form=form)
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, init="pissa"))


def begun(config) -> tuple[dict, dict]:
    """(the base without its principal part, the adapters that begin as that part)"""
    frozen = jax.jit(lambda p: model.frozen_base(p, config))(PARAMS)
    return frozen, lora.as_adapters(lora.split(frozen)[1])


def test_a_diagonal_matrix_by_hand():
    """diag(3, 8, 1) at rank 1, scale 2: the value 8 in the second place, of which A and B have sqrt(8 / 2) = 2 each."""
    start = lora.principal(jnp.diag(jnp.array([3.0, 8.0, 1.0])), 1, 2.0)
    np.testing.assert_allclose(np.abs(start["start_a"]), [[0], [2], [0]], atol=1e-6)
    np.testing.assert_allclose(start["start_a"] @ start["start_b"], np.diag([0, 4, 0]), atol=1e-6)
    np.testing.assert_allclose(lora.residual(jnp.diag(jnp.array([3.0, 8.0, 1.0])), start, 2.0), np.diag([3, 0, 1]), atol=1e-5)
    assert not np.isnan(lora.principal(jnp.zeros((3, 2)), 2, 1.0)["start_a"]).any()  # there are no such values


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_start_is_numpys_largest_triplets(shape):
    """s·A·B = U_r S_r V_rᵀ of numpy's SVD in float64, and both are its square roots: AᵀA = B·Bᵀ = S_r / s."""
    w = np.random.default_rng(0).normal(size=(2, *shape)) * 0.1
    start = jax.tree.map(np.asarray, lora.principal(jnp.asarray(w, jnp.float32), 5, 0.5))
    for layer in range(2):
        u, s, vt = np.linalg.svd(w[layer], full_matrices=False)
        a, b = start["start_a"][layer], start["start_b"][layer]
        np.testing.assert_allclose(0.5 * a @ b, (u[:, :5] * s[:5]) @ vt[:5], atol=2e-5)
        np.testing.assert_allclose(a.T @ a, np.diag(s[:5] / 0.5), atol=1e-4)
        np.testing.assert_allclose(b @ b.T, np.diag(s[:5] / 0.5), atol=1e-4)


def test_a_run_begins_as_the_model_and_that_is_the_reference():
    """Logits are the model's but for rounding; the base alone is that start, too, where adapters have moved on."""
    config = pissa_of()
    frozen, adapters = begun(config)
    plain = logits(PARAMS, CONFIG)
    np.testing.assert_allclose(logits(merge(frozen, adapters), config), plain, atol=5e-5)
    np.testing.assert_allclose(logits(frozen, config), plain, atol=5e-5)
    without = jax.tree.map(lambda x: x, frozen)
    without = {**lora.split(without)[0]}
    assert np.abs(logits(without, config) - plain).max() > 0.1  # the residual is another model
    both = jax.jit(make_gradient(config, losses.get("forward_kl"), 1, second_config=BASE))
    assert abs(float(both(adapters, UNPACKED, frozen=frozen)[0])) < 1e-7
    changed = moved(adapters)
    own, start = (jax.nn.log_softmax(logits(*pair)) for pair in ((merge(frozen, changed), config), (PARAMS, CONFIG)))
    expected = jnp.sum(jnp.sum(jnp.exp(start) * (start - own), -1) * UNPACKED.loss_mask) / jnp.sum(UNPACKED.loss_mask)
    assert expected > 0.01
    np.testing.assert_allclose(both(changed, UNPACKED, frozen=frozen)[0], expected, rtol=1e-4)


def test_what_is_quantized_is_the_residual():
    """Of matrices with a few large singular values NF4 loses less of the rest than of all (QPiSSA); the start says where."""
    config = pissa_of("nf4")
    spikes = jax.tree.map(lambda x: x, PARAMS)
    q = spikes["layers"]["attention"]["q"]
    column = jax.random.normal(jax.random.key(5), (2, 32, 1))
    q["kernel"] = q["kernel"] + 0.5 * column * column.mT
    kept = jax.jit(lambda p: model.frozen_base(p, config))(spikes)["layers"]["attention"]["q"]
    plain = jax.jit(lambda p: model.frozen_base(p, config_of(form="nf4")))(spikes)["layers"]["attention"]["q"]
    assert kept["kernel"]["codes"].dtype == jnp.uint8
    start = kernel_of(kept["kernel"]) + 2.0 * kept["start_a"] @ kept["start_b"]
    rms = [float(jnp.sqrt(jnp.mean(jnp.square(w - q["kernel"])))) for w in (start, kernel_of(plain["kernel"]))]
    assert rms[0] < 0.5 * rms[1]


def test_the_state_that_is_compiled_for_is_the_one_that_is_made_on_every_mesh():
    config, optimizer = pissa_of("int8"), opt.make(cfg.Optimizer(), 10)
    frozen, _ = begun(config)
    mesh = make_mesh(cfg.Mesh(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(frozen, shardings(frozen, mesh))
    adapters = states.draw_adapters(config, placed, mesh, seed=0)
    state = states.adopt(placed, config, optimizer, mesh, adapters=adapters)
    assert jax.tree.structure(states.abstract(config, optimizer, mesh)) == jax.tree.structure(state)
    down = state.frozen["layers"]["mlp"]["down"]
    assert [down[name].addressable_shards[0].data.shape for name in lora.STARTS] == [(2, 24, 4), (2, 4, 16)]
    whole = jax.jit(make_gradient(config, NLL, 1))(begun(config)[1], UNPACKED, frozen=begun(config)[0])
    with jax.set_mesh(mesh):
        split = jax.jit(make_gradient(config, NLL, 2))(state.params, UNPACKED, None, 0, state.frozen)
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), split[2], whole[2])


def test_a_run_resumes_bitwise_and_leaves_as_an_adapter_of_the_model_itself(base, tmp_path):  # noqa: F811
    """to-peft: rank 2r on the weights as they were computes what to-hf does, and so does a run that starts from it."""
    own = ["run.name=principal", "train.steps=4", "train.save_every=2", "lora.targets=[q, down]", "lora.init=pissa"]
    words = on(base, sft_words(base.parent), *own)
    assert train("sft", words) == 0
    run = base.parent / "principal"
    lines, whole = (run / "metrics.jsonl").read_text().splitlines(), final_params(run)
    shutil.rmtree(run / "checkpoints" / "00000004")
    assert train("sft", words) == 0
    jax.tree.map(np.testing.assert_array_equal, final_params(run), whole)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[3])["loss"] == json.loads(lines[3])["loss"]

    assert cli.convert(["to-peft", str(run), str(tmp_path / "peft")]) == 0
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (8, 64)  # the scale 32 / 4 of the run
    before = final_params(base)
    adapter = Adapter(8, 8.0, ("q", "down"))
    config = dataclasses.replace(locate(str(base)).config("float32", "float32"), adapter=adapter)
    given = hf.load_adapters(str(tmp_path / "peft"), config)
    assert np.abs(whole["layers"]["mlp"]["down"]["kernel"] - before["layers"]["mlp"]["down"]["kernel"]).max() > 1e-3
    again = jax.jit(lambda p: lora.merged(p, adapter))(merge(before, given))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), again, whole)


def test_grpo_measures_its_kl_from_the_model_that_it_began_with(base, tmp_path):  # noqa: F811
    words = on(base, grpo_words(tmp_path), "lora.init=pissa", "lora.base=nf4", "kl.coef=0.1", "train.steps=2")
    assert train("grpo", [*words, "optimizer.schedule=constant"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    kls = [line["kl"] for line in lines if line["step"]]
    assert abs(kls[0]) < 1e-6 < 1e-5 < kls[1]


@pytest.mark.parametrize("key", ["lora.kind=dora", "lora.weights=there", "lora.targets=[q, embedding]"])
def test_what_does_not_combine_is_refused_by_name(key):
    with pytest.raises(UserError, match=f"{key.split('=')[0]} does not combine with lora.init=pissa"):
        cfg.load("sft", ["model.preset=null", "model.weights=runs/sft", "lora.rank=4", "lora.init=pissa", key])
