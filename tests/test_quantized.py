"""A base in int8 and NF4: by hand, against NumPy, and against the model whose matrices are the ones made of the codes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params
from scipy.stats import norm
from test_lora import PARAMS, config_of, moved
from test_step import UNPACKED

from jaxreason import config as cfg
from jaxreason import losses, model
from jaxreason.errors import UserError
from jaxreason.model import lora, quantized
from jaxreason.sharding import device_bytes, make_mesh
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.step import make_gradient
from jaxreason.types import merge


def test_nf4_is_made_of_quantiles_of_a_normal_distribution():
    """8 levels above 1/2 and 7 below, evenly spaced in probability up to 1 - (1/30 + 1/32) / 2, and 0."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (norm.ppf(np.linspace(0.5, outermost, count + 1)[1:]) for count in (8, 7))
    values = np.array([*-below[::-1], 0, *above]) / above[-1]
    np.testing.assert_allclose(quantized.NF4, values, atol=3e-7)  # the paper's have float32's digits
    assert len(values) == 16 and quantized.NF4[::15] == (-1, 1)


def test_a_block_by_hand():
    """64 inputs, of which all but four are 0, the code 7: absmax 2, and 1, -2, 0.3 and 2 are 0.5, -1, 0.15 and 1 of it."""
    column = np.zeros((64, 1), np.float32)
    column[:4, 0] = [1.0, -2.0, 0.3, 2.0]
    found = quantized.quantize(column, "nf4")
    assert found["codes"].shape == (32, 1) and found["codes"].dtype == jnp.uint8
    # 0.5 is nearest to 0.4407 (12), and 0.15 to 0.1609 (9); the first of two rows is in the low half of their byte.
    assert found["codes"][:3, 0].tolist() == [12 + 16 * 0, 9 + 16 * 15, 7 + 16 * 7]
    np.testing.assert_allclose(quantized.kernel_of(found)[:5, 0], [0.8814197, -2, 0.3218604, 2, 0], rtol=1e-6)
    found = quantized.quantize(column, "int8")
    assert found["codes"][:5, 0].tolist() == [64, -127, 19, 127, 0]  # 63.5 is rounded to the even number
    np.testing.assert_allclose(quantized.kernel_of(found)[:5, 0], np.array([64, -127, 19, 127, 0]) * 2 / 127, rtol=1e-6)


def test_matrices_by_a_twin_in_numpy_and_within_their_bounds():
    """Blocks of 64 inputs, and groups of 256 absmaxes; a stack is its layers one by one, also of a block of zeros."""
    w = np.random.default_rng(0).normal(size=(2, 128, 512)).astype(np.float32)
    w[1, :64, :256] = 0.0
    blocks = w.reshape(2, 2, 64, 512)
    absmax = np.abs(blocks).max(2)
    found = quantized.kernel_of(quantized.quantize(w, "int8"))
    assert (np.abs(found - w).reshape(blocks.shape) <= absmax[:, :, None] / 127 / 2 * (1 + 1e-5)).all()

    stored = quantized.quantize(w, "nf4")
    groups = absmax.reshape(2, 2, 2, 256)
    lowest, step = groups.min(-1), (groups.max(-1) - groups.min(-1)) / np.float32(255)
    again = lowest[..., None] + np.rint((groups - lowest[..., None]) / np.where(step, step, 1)[..., None]) * step[..., None]
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in stored.items()} == {
        "codes": ((2, 64, 512), "uint8"), "absmax": ((2, 2, 512), "uint8"), "lowest": ((2, 2, 2), "float32"),
        "step": ((2, 2, 2), "float32"),
    }  # fmt: skip
    levels, units = np.array(quantized.NF4), blocks / np.where(absmax, absmax, 1)[:, :, None]
    nearest = levels[np.abs(units[..., None] - levels).argmin(-1)]
    twin = (nearest * again.reshape(absmax.shape)[:, :, None]).reshape(w.shape)
    found = quantized.kernel_of(stored)
    assert (np.abs(found - twin) > 1e-5).sum() <= 2  # float32 and float64 may differ about what is nearest
    widest = np.diff(levels).max() / 2 * absmax + step.repeat(256, -1).reshape(absmax.shape) / 2
    assert (np.abs(found - w).reshape(blocks.shape) <= widest[:, :, None] + 1e-6).all()
    assert not found[1, :64, :256].any()


def test_a_model_beside_codes_is_the_one_beside_their_matrices():
    """DoRA's norms, value and gradients, and decoding's weights."""
    config, plain = config_of("dora", form="nf4"), config_of("dora")

    def made(params: dict) -> tuple[dict, dict, dict, dict]:
        params = model.frozen_base(params, config)
        matrices = quantized.map_kernels(quantized.kernel_of, params)
        adapters = lora.with_magnitudes(model.init_adapters(config, jax.random.key(2)), params)
        return params, matrices, adapters, lora.with_magnitudes(adapters, matrices)

    params, matrices, adapters, twin = jax.jit(made)(PARAMS)
    assert np.abs(matrices["layers"]["mlp"]["up"]["kernel"] - PARAMS["layers"]["mlp"]["up"]["kernel"]).max() > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), adapters, twin)
    adapters, loss = moved(adapters), losses.get("nll")
    wanted = jax.jit(make_gradient(plain, loss, 1))(adapters, UNPACKED, frozen=matrices)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted[2])) > 1e-4

    found = jax.jit(make_gradient(config, loss, 1))(adapters, UNPACKED, frozen=params)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), found[2], wanted[2])
    decoding = jax.jit(lambda p: (model.unstack(merge(*p[:2]), config), model.unstack(merge(*p[::2]), plain)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *decoding((adapters, params, matrices)))


def shapes(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    """Of whatever a program computes, in its loops too."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)


@pytest.mark.parametrize("remat", ["none", "matmuls"])
def test_no_pass_keeps_the_matrices_of_all_layers(remat):
    """Neither forward nor backward has a stack of what the codes are made into, [2, 32, 48] of gate and up."""
    config = config_of(form="nf4").replace(remat=remat)
    base = jax.eval_shape(lambda: model.frozen_base(PARAMS, config))
    adapters = jax.eval_shape(lambda: model.init_adapters(config, jax.random.key(2)))
    made = jax.make_jaxpr(make_gradient(config, losses.get("nll"), 1))(adapters, UNPACKED, None, 0, base)
    found = set(shapes(made.jaxpr))
    assert (32, 48) in found and not found & {(2, 32, 48), (2, 48, 32)}


@pytest.mark.parametrize("scan_layers", [True, False])
def test_what_is_kept_as_codes_is_not_cast(scan_layers):
    """A layer's codes, written out too, are the stack's own; its norms are in the compute dtype."""
    config = config_of(form="nf4").replace(compute_dtype="bfloat16", scan_layers=scan_layers)
    params = jax.jit(lambda p: model.frozen_base(p, config))(PARAMS)
    found, layers = jax.jit(lambda p: model.cast_layers(p, config))(params)["layers"], params["layers"]
    layer = found if scan_layers else jax.tree.map(lambda *w: jnp.stack(w), *found)
    jax.tree.map(np.testing.assert_array_equal, layer["mlp"]["up"], layers["mlp"]["up"])
    assert layer["mlp"]["up"]["kernel"]["step"].dtype == jnp.float32 and layer["mlp_norm"]["scale"].dtype == jnp.bfloat16


def test_the_state_has_a_bit_more_than_four_bits_a_weight():
    """Of a matrix of 128 x 256: 16,384 bytes of codes, 512 of absmaxes, 2 x 4 x 2 of their groups."""
    arch = {"embed_dim": 128, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "mlp_dim": 256, "vocab_size": 64}
    config = config_of(form="nf4").replace(**arch, num_layers=3)
    mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
    frozen = states.abstract(config, opt.make(cfg.Optimizer(), 10), mesh).frozen
    assert device_bytes(frozen["layers"]["mlp"]["up"]) == 3 * (16384 + 512 + 16)
    assert device_bytes(frozen["layers"]["attention"]["q"]) == 3 * (8192 + 256 + 16)
    assert frozen["embedding"].dtype == jnp.float32
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), frozen, jax.eval_shape(
        lambda: model.frozen_base(model.init(config, jax.random.key(0)), config)))  # fmt: skip
    with pytest.raises(UserError, match="lora.base nf4: k has 40 inputs, which blocks of 64"):
        model.full_shapes(config.replace(embed_dim=40))


def test_a_base_is_of_adapters():
    with pytest.raises(UserError, match="lora.base is of adapters, and there are none: set lora.rank"):
        cfg.load("sft", ["lora.base=nf4"])
