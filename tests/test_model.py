"""The model against transformers on torch, its gradients, packing, remat policies and cached decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxreason import hf, model
from jaxreason.errors import UserError
from jaxreason.model.flops import matmul_weights
from jaxreason.model.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
# One architecture for each thing that can go wrong; T = 4096 is far beyond the 256 positions that llama3 starts from.
ARCHITECTURES = {
    "tied, 1 kv head, llama3": dict(tie_word_embeddings=True, num_key_value_heads=1, rope_scaling=LLAMA3),
    "untied, 2 kv heads, head_dim 32": dict(num_key_value_heads=2, head_dim=32, rope_scaling=LLAMA3),
    "4 kv heads, biases": dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    # 6 heads of 8: torch's and numpy's powers of 1e6 are the same float32 there; for 4 of 12 two frequencies differ by 2 ulp.
    "qwen2, tied, 6 heads": dict(model_type="qwen2", num_attention_heads=6, tie_word_embeddings=True, rope_theta=1e6,
                                 sliding_window=64),
    "qwen3, head_dim 32": dict(model_type="qwen3", head_dim=32, rope_theta=1e6),
}  # fmt: skip
V, T = 96, 4096


def torch_model(model_type: str = "llama", **changes) -> transformers.PreTrainedModel:
    """A random model whose weights are wide enough that attention picks tokens instead of averaging them."""
    import torch

    values = dict(
        vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, rope_theta=5e5, tie_word_embeddings=False,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **values | changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    return theirs


def convert(theirs, directory):
    theirs.save_pretrained(directory)
    return hf.load(directory)


def random_tokens(t: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (rows, t), dtype=np.int32)


logits = jax.jit(model.logits, static_argnums=1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers_at_every_position(name, tmp_path):
    import torch

    theirs = torch_model(**ARCHITECTURES[name])
    params, config = convert(theirs, tmp_path)
    tokens = random_tokens(T)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(logits(params, config, tokens))
    assert wanted.std() > 0.5
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)
    if config.arch.rope_scaling and config.arch.tie_embeddings:
        # The length has to be long enough to see 3.1's factor in place of 3.2's, or the line above shows nothing.
        scaling = dataclasses.replace(config.arch.rope_scaling, factor=8.0)
        wrong = np.asarray(logits(params, config.replace(rope_scaling=scaling), tokens))
        assert np.abs(wrong - wanted)[:, 2048:].max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_scaling=LLAMA3),
        dict(model_type="qwen3", head_dim=16),
    ],
)
def test_gradients_equal_torch_autograd(tmp_path, changes):
    import torch

    theirs = torch_model(**changes)
    params, config = convert(theirs, tmp_path / "in")
    tokens = random_tokens(520, rows=2)

    def loss(params):
        logp = jax.nn.log_softmax(model.logits(params, config, tokens[:, :-1]))
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], 2).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    out = theirs(torch.from_numpy(tokens[:, :-1])).logits
    wanted = torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).long().flatten())
    wanted.backward()
    assert abs(float(value) - wanted.item()) < 1e-5
    # The gradients travel through the exporter, so that names and transposes are compared too.
    hf.save(grads, config, tmp_path / "out", dtype="float32")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        scale = weight.grad.abs().max().item()
        difference = (ours[name] - weight.grad).abs().max().item()
        assert difference < 1e-4 * scale, (name, difference, scale)


def tiny(**changes) -> model.ModelConfig:
    values = dict(
        vocab_size=V, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        rope_scaling=model.RopeScaling("llama3", 32.0, original_max_positions=64),
    )  # fmt: skip
    return model.make_config(**values | changes)


def random_params(config: model.ModelConfig) -> dict:
    """init's tree with wide kernels and no zero bias, drawn by numpy: compiling init takes longer than these tests."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))

    def draw(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        return 1 + noise if path[-1].key == "scale" else noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(tiny())


# Many programs, each run once or twice: compiled without optimization they cost half.
@functools.partial(jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
def summed(params, config, tokens, positions, segment_ids, weight):
    """Logits, the gradient of their weighted sum in the embedded tokens (as NEFTune noise), and in the parameters."""
    noise = jnp.zeros((*tokens.shape, config.arch.embed_dim))

    def total(params, noise):
        x = model.hidden(params, config, tokens, positions, segment_ids, noise)
        out = jnp.einsum("btd,vd->btv", x, model.head_kernel(params, config))
        return jnp.sum(out * weight), out

    (_, out), (in_params, in_tokens) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, noise)
    return out, in_tokens, in_params


def packed_row(lengths: list[int], padding: int):
    """tokens, positions, segment ids [1, T] of one packed row, and the slice of each segment."""
    parts, start = [], 0
    for n in lengths:
        parts.append(slice(start, start + n))
        start += n
    tokens = random_tokens(start + padding)
    positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])[None].astype(np.int32)
    ids = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])[None].astype(np.int32)
    return tokens, positions, ids, parts


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_packed_segments_share_nothing(params, backend):
    """700 tokens, two blocks; changing the middle segment moves no bit of the others, and each equals itself alone."""
    config = tiny(attention=backend)
    tokens, positions, ids, parts = packed_row([130, 470, 80], 20)
    weight = np.random.default_rng(2).standard_normal((1, 700, V), np.float32) * (ids > 0)[..., None]
    out, grads, _ = map(jax.device_get, summed(params, config, tokens, positions, ids, weight))
    changed = tokens.copy()
    changed[:, parts[1]] = (tokens[:, parts[1]] + 1) % V
    new_weight = weight.copy()
    new_weight[:, parts[1]] *= -3
    new_out, new_grads, _ = map(jax.device_get, summed(params, config, changed, positions, ids, new_weight))
    assert np.abs(new_out - out)[:, parts[1]].min(axis=-1).max() > 0
    for part in (parts[0], parts[2]):
        np.testing.assert_array_equal(new_out[:, part], out[:, part])
        np.testing.assert_array_equal(new_grads[:, part], grads[:, part])
    unpacked = np.stack([np.pad(tokens[0, part], (0, 470 - part.stop + part.start)) for part in parts])
    alone = np.asarray(logits(params, tiny(), unpacked))  # causal, so the zeros behind a row cannot matter
    for row, part in zip(alone, parts):
        wanted = row[: part.stop - part.start]
        np.testing.assert_allclose(out[0, part], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_backends_agree_on_parameter_gradients(params):
    row = packed_row([130, 470, 80], 20)
    tokens, positions, ids, _ = row
    weight = np.random.default_rng(2).standard_normal((1, 700, V), np.float32) * (ids > 0)[..., None]
    found, wanted = (
        summed(params, tiny(attention=backend), tokens, positions, ids, weight)[2]
        for backend in ("blockwise", "reference")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), found, wanted)


@pytest.mark.parametrize("remat", ["full", "attention", "matmuls"])
def test_remat_changes_no_gradient(params, remat):
    tokens, positions, ids, _ = packed_row([20, 30], 14)
    weight = np.ones((1, 64, V), np.float32) * (ids > 0)[..., None]
    plain, saved = (
        summed(params, tiny(remat=policy), tokens, positions, ids, weight)[2] for policy in ("none", remat)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()), saved, plain)


def test_remat_policies_keep_what_they_name(params):
    tokens = jnp.zeros((1, 64), jnp.int32)

    def residual_bytes(remat):
        def loss(params):
            return model.hidden(params, tiny(remat=remat), tokens).sum()

        pullback = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    sizes = [residual_bytes(remat) for remat in ("full", "attention", "matmuls", "none")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


def test_cached_decoding_equals_the_full_forward():
    """Prefill of 5 tokens, then one at a time; row 1 starts 3 slots later, as a left-padded prompt does."""
    config = tiny(tie_embeddings=False, attention_bias=True, mlp_bias=True)
    params = random_params(config)
    t, slots, shift = 12, 16, np.asarray([0, 3])
    tokens = random_tokens(t, rows=2)
    layers = model.unstack(params, config)

    @jax.jit
    def step(caches, new, start):
        s = new.shape[1]
        positions = jnp.broadcast_to(start + jnp.arange(s), new.shape)
        at = positions + shift[:, None]

        def write(cache, *values):
            def put(buffer, value):
                return jax.vmap(lambda b, a, x: b.at[:, a].set(x.swapaxes(0, 1)))(buffer, at, value)

            return tuple(put(buffer, value) for buffer, value in zip(cache, values))

        column = jnp.arange(slots)
        visible = (column >= shift[:, None, None]) & (column <= at[..., None])
        x, caches = model.step_cached(layers, config, new, positions, caches, write, visible)
        return jnp.einsum("bsd,vd->bsv", x, model.head_kernel(layers, config)), caches

    shape = (2, config.arch.num_kv_heads, slots, config.arch.head_dim)
    caches = [(jnp.full(shape, 7.0), jnp.full(shape, 7.0)) for _ in range(config.arch.num_layers)]
    out, caches = step(caches, tokens[:, :5], 0)
    found = [out]
    for i in range(5, t):
        out, caches = step(caches, tokens[:, i : i + 1], i)
        found.append(out)
    wanted = np.asarray(logits(params, config, tokens))
    np.testing.assert_allclose(np.concatenate(found, 1), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_rope_frequencies_equal_transformers():
    config = model.preset("llama3.2-3b")
    for scaling in (config.arch.rope_scaling, model.RopeScaling("linear", 8.0), None):
        ours = inverse_frequencies(config.replace(rope_scaling=scaling).arch)
        theirs = transformers.LlamaConfig(**hf.config_to_hf(config.replace(rope_scaling=scaling), "float32"))
        wanted = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs).inv_freq.numpy()
        np.testing.assert_allclose(ours, wanted, rtol=3e-7)
    ours = inverse_frequencies(config.arch)
    # by hand: wavelength 2π is kept; the longest, 2π·5e5^(126/128) > 8192, is divided by 32
    assert ours[0] == 1.0
    assert ours[-1] == pytest.approx(5e5 ** (-126 / 128) / 32, rel=1e-6)


def test_parameter_counts():
    """Published sizes of the released models, exact or in billions as their model cards round or cut them."""
    exact = {"llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "llama3.1-8b": 8_030_261_248,
             "smollm2-135m": 134_515_008}  # fmt: skip
    for name, count in exact.items():
        assert model.param_count(model.preset(name)) == count, name
    billions = {
        "llama3.1-70b": 70.6, "llama3-8b": 8.03, "llama3-70b": 70.6, "smollm2-360m": 0.362, "smollm2-1.7b": 1.71,
        "tinyllama-1.1b": 1.1, "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61,
        "qwen2.5-14b": 14.7, "qwen2.5-32b": 32.5, "qwen2.5-72b": 72.7, "qwen2.5-math-1.5b": 1.54, "qwen2.5-math-7b": 7.61,
        "qwen2.5-math-72b": 72.7, "r1-distill-qwen-1.5b": 1.78, "r1-distill-qwen-7b": 7.62, "qwen3-0.6b": 0.6,
        "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.8, "qwen3-32b": 32.8,
    }  # fmt: skip
    assert {*exact, *billions, "embedded-tiny"} == set(model.PRESETS)
    for name, count in billions.items():
        assert model.param_count(model.preset(name)) == pytest.approx(count * 1e9, rel=0.01), name


def test_parameter_counts_by_hand():
    """V 10, D 4, F 6, N 2, K 1, H 8 over 3 layers: attention 4·16 + 2·4·8 + 16·4 = 192, mlp 72, norms 8."""
    sizes = dict(vocab_size=10, embed_dim=4, mlp_dim=6, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8)
    layer = 192 + 72 + 8
    for family, tied, changes, wanted in (
        ("llama", True, {}, 3 * layer + 4 + 40),
        ("llama", False, {"attention_bias": True, "mlp_bias": True}, 3 * (layer + 16 + 8 + 8 + 4 + 6 + 6 + 4) + 4 + 80),
        ("qwen2", True, {}, 3 * (layer + 16 + 8 + 8) + 4 + 40),
        ("qwen3", False, {}, 3 * (layer + 8 + 8) + 4 + 80),
    ):
        config = model.make_config(family, **sizes, tie_embeddings=tied, **changes)
        assert model.param_count(config) == wanted, family
        assert matmul_weights(config) == 3 * (192 + 72) + 40, family


def test_bfloat16_compute_keeps_float32_where_it_decides(params):
    config = tiny(compute_dtype="bfloat16")
    tokens = random_tokens(470, rows=3)
    x = jax.eval_shape(lambda p: model.hidden(p, config, tokens), params)
    out = logits(params, config, tokens)
    assert x.dtype == jnp.bfloat16
    assert out.dtype == jnp.float32
    exact = np.asarray(logits(params, tiny(), tokens))
    assert 0 < np.abs(out - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_layer": 2}, "num_layers"),
        ({"num_layers": 2.5}, "num_layers is 2.5"),
        ({"num_heads": 3}, "num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"rope_scaling": {"kind": "llama3"}}, "factor"),
        ({"max_segments": 8}, "max_segments is below 32"),
    ],
)
def test_bad_architectures_are_named(overrides, words):
    with pytest.raises(UserError, match=words):
        model.preset("embedded-tiny", overrides)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean llama3\.2-3b"):
        model.preset("llama3.2-3B")
