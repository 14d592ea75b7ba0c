"""Adapters: by hand, against the full weights' own gradients, and through runs, checkpoints and PEFT's files."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import final_params, grpo_words, sft_words
from safetensors.numpy import load_file, save_file
from test_step import CONFIG, PACKED, UNPACKED

from jaxreason import checkpoint, cli, hf, losses, model
from jaxreason import config as cfg
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError
from jaxreason.model import Adapter, lora
from jaxreason.model.flops import weight_flops_per_token
from jaxreason.model.quantized import kernel_of, map_kernels, quantize
from jaxreason.restore import restore_tree
from jaxreason.sharding import batch_sharding, make_mesh, replicated, shardings
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.setup import Setup
from jaxreason.train.step import BASE, make_gradient
from jaxreason.types import merge
from jaxreason.weights import WeightSource

ALL = ("q", "k", "v", "o", "gate", "up", "down")
init = jax.jit(model.init, static_argnums=0)  # op by op it takes seconds
PARAMS = init(CONFIG, jax.random.key(1))
NLL = losses.get("nll")
TINY_MODEL = model.preset(
    "embedded-tiny", {"num_layers": 1, "embed_dim": 32, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
)


def config_of(kind: str = "lora", rank: int = 4, scale: float = 2.0, targets=ALL, form: str = "param") -> model.ModelConfig:
    return dataclasses.replace(CONFIG, adapter=Adapter(rank, scale, targets, kind, form))


@functools.partial(jax.jit, static_argnums=0)
def start_of(config) -> dict:
    return lora.with_magnitudes(model.init_adapters(config, jax.random.key(2)), PARAMS)


@jax.jit
def moved(adapters: dict) -> dict:
    """Adapters away from their start: every leaf, B among them, is changed."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@functools.partial(jax.jit, static_argnums=1)
def logits(params: dict, config: model.ModelConfig):
    return model.logits(params, config, UNPACKED.tokens)


# ---- what they compute


def test_one_dense_by_hand():
    """x W = (1, 2); x A = 7, (x A) B = (14, -7), halved (7, -3.5). W + s A B has columns (2, 3), (-0.5, -0.5)."""
    x, w = jnp.array([[1.0, 2.0]]), jnp.eye(2)
    leaves = {"kernel": w, "lora_a": jnp.array([[1.0], [3.0]]), "lora_b": jnp.array([[2.0, -1.0]])}
    adapter = Adapter(1, 0.5, ("q",))
    np.testing.assert_allclose(lora.adapted(x @ w, x, leaves, adapter), [[8.0, -1.5]])
    np.testing.assert_allclose(lora.merged(leaves, adapter)["kernel"], [[2.0, -0.5], [3.0, -0.5]])
    leaves["magnitude"], adapter = jnp.array([2 * 13**0.5, 0.5**0.5]), dataclasses.replace(adapter, kind="dora")
    np.testing.assert_allclose(lora.adapted(x @ w, x, leaves, adapter), [[16.0, -1.5]], rtol=1e-6)
    np.testing.assert_allclose(lora.merged(leaves, adapter)["kernel"], [[4.0, -0.5], [6.0, -0.5]], rtol=1e-6)


def test_adapters_begin_as_the_model_itself():
    """A uniform in ±1/sqrt(in), so with variance 1/(3 in); B zero: the logits are the same bits."""
    config = config_of(rank=16)
    adapters = start_of(config)
    np.testing.assert_array_equal(logits(merge(PARAMS, adapters), config), logits(PARAMS, CONFIG))
    down = adapters["layers"]["mlp"]["down"]
    assert down["lora_a"].shape == (2, 48, 16) and down["lora_b"].shape == (2, 16, 32) and not down["lora_b"].any()
    np.testing.assert_allclose(np.var(down["lora_a"]), 1 / (3 * 48), rtol=0.1)
    assert np.abs(down["lora_a"]).max() < 48**-0.5
    assert set(adapters["layers"]) == {"attention", "mlp"} and "kernel" not in down
    assert set(start_of(config_of(targets=("q", "up")))["layers"]["attention"]) == {"q"}


def test_a_full_rank_reaches_any_weights():
    """A = 1 and B = (wanted - W) / s make q another model's q, and the logits that model's."""
    config = config_of(rank=32, scale=0.5, targets=("q",))
    wanted = init(CONFIG, jax.random.key(9))["layers"]["attention"]["q"]["kernel"]
    q = PARAMS["layers"]["attention"]["q"]["kernel"]
    adapters = {"layers": {"attention": {"q": {"lora_a": jnp.stack([jnp.eye(32)] * 2), "lora_b": (wanted - q) / 0.5}}}}
    other = jax.tree.map(lambda x: x, PARAMS)
    other["layers"]["attention"]["q"]["kernel"] = wanted
    np.testing.assert_allclose(logits(merge(PARAMS, adapters), config), logits(other, CONFIG), atol=2e-5)
    with pytest.raises(UserError, match=r"lora.rank 17: k is a matrix of 32 x 16"):
        lora.check(PARAMS, config_of(rank=17).adapter)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_are_those_of_the_full_weights_by_the_chain_rule(kind):
    """The twin forms every W + s A B, and DoRA's m (W + s A B) / norm, by itself and differentiates the plain model."""
    config = config_of(kind)
    adapters = moved(start_of(config))

    def kernel(w, leaves):
        whole = w + 2.0 * jnp.einsum("lir,lro->lio", leaves["lora_a"], leaves["lora_b"])
        if kind == "lora":
            return whole
        norm = jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=1, keepdims=True))
        return leaves["magnitude"][:, None] * whole / norm

    def twin(adapters):
        params = {**PARAMS, "layers": {**PARAMS["layers"]}}
        for module, denses in adapters["layers"].items():
            changed = {name: {"kernel": kernel(PARAMS["layers"][module][name]["kernel"], x)} for name, x in denses.items()}
            params["layers"][module] = PARAMS["layers"][module] | changed
        b = UNPACKED
        logp = jax.nn.log_softmax(model.logits(params, CONFIG, b.tokens, b.positions, b.segment_ids))
        picked = jnp.take_along_axis(logp, b.targets[..., None], -1)[..., 0]
        return -jnp.sum(picked * b.loss_mask) / jnp.sum(b.loss_mask)

    expected, wanted = jax.jit(jax.value_and_grad(twin))(adapters)
    value, _, grads, _ = jax.jit(make_gradient(config, NLL, 1))(adapters, UNPACKED, frozen=PARAMS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), grads, wanted)


def test_microbatches_packing_written_out_layers_and_meshes_change_nothing():
    """Of a base in NF4, whose blocks of 16 or 32 inputs are split as its matrices are; an unquantized one does no more."""
    config = config_of(form="nf4")
    adapters, base = moved(start_of(config)), jax.jit(lambda p: model.frozen_base(p, config))(PARAMS)
    whole = jax.jit(make_gradient(config, NLL, 1))(adapters, UNPACKED, frozen=base)[:3]

    def assert_same(found):
        np.testing.assert_allclose(found[0], whole[0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), found[2], whole[2])

    written_out = config.replace(scan_layers=False, remat="matmuls")
    assert_same(jax.jit(make_gradient(written_out, NLL, 2))(adapters, PACKED, frozen=base)[:3])
    mesh = make_mesh(cfg.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(tree, shardings(tree, mesh)) for tree in (adapters, base)]
        gradient = jax.jit(make_gradient(config, NLL, 2), out_shardings=replicated(mesh))
        batch = jax.device_put(UNPACKED, batch_sharding(mesh))
        assert_same(gradient(placed[0], batch, None, 0, placed[1])[:3])
    q, o = (placed[0]["layers"]["attention"][name] for name in "qo")
    assert q["lora_a"].addressable_shards[0].data.shape == (2, 16, 4)  # [L, in / fsdp, r]
    assert q["lora_b"].addressable_shards[0].data.shape == (2, 4, 16)  # [L, r, out / tensor]
    assert o["lora_a"].addressable_shards[0].data.shape == (2, 16, 4)
    down = placed[1]["layers"]["mlp"]["down"]["kernel"]  # three blocks of 16 inputs, which two devices cannot share
    assert [down[name].addressable_shards[0].data.shape for name in ("codes", "absmax")] == [(2, 12, 16), (2, 3, 16)]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_decoding_has_one_matrix_for_both(kind):
    """The rollout's weights are the plain model's whose kernels are merged, in bfloat16 rounded once."""
    config = config_of(kind).replace(compute_dtype="bfloat16")
    params = merge(PARAMS, moved(start_of(config)))
    found, merged = jax.jit(lambda p: (model.unstack(p, config), lora.merged(p, config.adapter)))(params)
    twin = jax.jit(lambda p: model.unstack(p, CONFIG.replace(compute_dtype="bfloat16")))(merged)
    jax.tree.map(np.testing.assert_array_equal, found, twin)
    plain = logits(merged, CONFIG)
    np.testing.assert_allclose(logits(params, config.replace(compute_dtype="float32")), plain, atol=1e-4)


def test_b_may_learn_faster_than_a_and_magnitudes_do_not_decay():
    """One Adam update moves every element by the rate: A by 0.01, B by 16 times that, and a magnitude without its decay."""
    leaves = {"lora_a": jnp.full((2, 3), 0.5), "lora_b": jnp.full((2, 3), 0.5), "magnitude": jnp.full(3, 0.5)}
    settings = cfg.Optimizer(learning_rate=0.01, schedule="constant", weight_decay=0.2, max_grad_norm=None)
    optimizer = opt.make(settings, 10, b_ratio=16.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, leaves), optimizer.init(leaves), leaves)
    decay = 0.01 * 0.2 * 0.5
    for name, wanted in {"lora_a": -0.01 - decay, "lora_b": 16 * (-0.01 - decay), "magnitude": -0.01}.items():
        np.testing.assert_allclose(updates[name], np.full(leaves[name].shape, wanted), rtol=1e-5)


def test_a_loss_compares_with_the_base_that_the_state_holds():
    """KL to the model without its adapters: none where they change nothing, and the plain model's where they do."""
    config, loss = config_of(), losses.get("forward_kl")
    both = jax.jit(make_gradient(config, loss, 1, second_config=BASE))
    value, _, _, _ = both(start_of(config), UNPACKED, frozen=PARAMS)
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    adapters = moved(start_of(config))
    value, _, _, _ = both(adapters, UNPACKED, frozen=PARAMS)
    own, plain = (jax.nn.log_softmax(logits(*pair)) for pair in ((merge(PARAMS, adapters), config), (PARAMS, CONFIG)))
    expected = jnp.sum(jnp.sum(jnp.exp(plain) * (plain - own), -1) * UNPACKED.loss_mask) / jnp.sum(UNPACKED.loss_mask)
    assert value > 0.01
    np.testing.assert_allclose(value, expected, rtol=1e-4)


# ---- runs


def train(algorithm: str, words: list[str]) -> int:
    return cli.train(["--config", algorithm, *words])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """What a converted model is: a checkpoint of weights alone, and a tokenizer."""
    run, config = tmp_path_factory.mktemp("base") / "base", TINY_MODEL
    checkpoint.save_params(run / "checkpoints", init(config, jax.random.key(0)), config)
    load("embedded").save(run / "tokenizer")
    return run


def on(base: Path, words: list[str], *more: str) -> list[str]:
    kept = [w for w in words if not w.startswith(("model.overrides", "model.preset", "model.weights"))]
    return [*kept, f"model.weights={base}", "model.preset=null", "lora.rank=4", "optimizer.learning_rate=0.01", *more]


def beside(base: Path) -> list[str]:
    more = ["run.name=tuned", "train.steps=4", "train.save_every=2", "lora.targets=[q, down]", "lora.base=nf4"]
    return on(base, sft_words(base.parent), *more)


@pytest.fixture(scope="module")
def tuned(base) -> Path:
    """Four steps beside the base in NF4, saved at the second."""
    assert train("sft", beside(base)) == 0
    return base.parent / "tuned"


def adapters_of(run: Path, step: int) -> dict:
    params = run / "checkpoints" / f"{step:08d}" / "params"
    shapes = {"lora_a": (1, 32, 4), "lora_b": (1, 4, 32)}
    of = lambda a, b: {"lora_a": jax.ShapeDtypeStruct(a, np.float32), "lora_b": jax.ShapeDtypeStruct(b, np.float32)}  # noqa: E731
    tree = {"layers": {"attention": {"q": of(*shapes.values())}, "mlp": {"down": of((1, 48, 4), (1, 4, 32))}}}
    return jax.tree.map(np.asarray, restore_tree(params, tree))  # and nothing else is there, or it raises


def assert_merged(merged: dict, base: dict, adapters: dict, scale: float) -> None:
    """What a run opens as: s A B added where there are adapters."""
    for path, name in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
        kernel = base["layers"][path][name]["kernel"]
        if leaves := adapters["layers"][path].get(name):
            kernel = kernel + scale * leaves["lora_a"].astype(np.float64) @ leaves["lora_b"]
            assert np.abs(leaves["lora_b"]).max() > 1e-3
        np.testing.assert_allclose(merged["layers"][path][name]["kernel"], kernel, atol=1e-5)
    np.testing.assert_array_equal(merged["embedding"], base["embedding"])


def test_a_checkpoint_holds_adapters_resumes_bitwise_and_opens_merged(base, tuned, tmp_path, capsys):
    """Its base is quantized anew whenever it is read, to the same bits; what is exported is what was trained beside."""
    whole, merged, before = adapters_of(tuned, 4), final_params(tuned), final_params(base)
    rounded = jax.jit(lambda p: map_kernels(lambda w: kernel_of(quantize(w, "nf4")), p))(before)
    assert np.abs(rounded["layers"]["attention"]["o"]["kernel"] - before["layers"]["attention"]["o"]["kernel"]).max() > 1e-3
    assert_merged(merged, rounded, whole, 8.0)  # alpha 32 / rank 4
    said = json.loads((tuned / "checkpoints" / "00000004" / "model.json").read_text())
    assert said["base"]["path"] == str(base / "checkpoints" / "00000000") and said["adapter"]["rank"] == 4
    assert said["adapter"]["base"] == "nf4"

    lines = (tuned / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tuned / "checkpoints" / "00000004")
    words = beside(base)
    assert train("sft", words) == 0
    jax.tree.map(np.testing.assert_array_equal, adapters_of(tuned, 4), whole)
    assert json.loads((tuned / "metrics.jsonl").read_text().splitlines()[3])["loss"] == json.loads(lines[3])["loss"]

    assert cli.convert(["to-hf", str(tuned), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    exported, _ = hf.load(tmp_path / "hf")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), exported, merged)  # merged over eight devices
    source = WeightSource.at(str(tmp_path / "hf"))  # each of its matrices is rounded as it is read
    config = dataclasses.replace(source.config("float32", "float32"), adapter=Adapter(4, 8.0, ("q", "down"), base="nf4"))
    read = source.params(config, make_mesh(cfg.Mesh(), jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, read, jax.jit(lambda p: model.frozen_base(p, config))(exported))
    assert "rounded to nf4" in capsys.readouterr().out and "rounded to nf4" in (tmp_path / "hf" / "README.md").read_text()
    assert train("sft", [*words, "lora.alpha=16", "lora.base=int8"]) == 2
    refused = capsys.readouterr().err
    assert "lora.alpha: 32.0 there, 16.0 now" in refused and "lora.base: 'nf4' there, 'int8' now" in refused


def test_a_base_that_is_gone_is_said(base, tuned, tmp_path, capsys):
    moved_away = base.with_name("elsewhere")
    base.rename(moved_away)
    try:
        assert cli.convert(["to-hf", str(tuned), str(tmp_path / "hf")]) == 2
        assert "the weights that they were trained with are no longer there" in capsys.readouterr().err
        assert train("sft", beside(base)) == 2
        assert "the weights that this run found when it started are no longer there" in capsys.readouterr().err
    finally:
        moved_away.rename(base)


def in_bfloat16(tensors: dict) -> bytes:
    """A safetensors file, as PEFT writes it of a model in bfloat16: header length, header, values."""
    header, end = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(value.tobytes() for value in tensors.values())


def test_peft_files_by_name_and_shape_and_back(base, tuned, tmp_path, capsys):
    out = tmp_path / "peft"
    assert cli.convert(["to-peft", str(tuned), str(out)]) == 0
    tensors, prefix = load_file(out / "adapter_model.safetensors"), "base_model.model.model.layers.0."
    assert {name: value.shape for name, value in tensors.items()} == {
        prefix + "self_attn.q_proj.lora_A.weight": (4, 32), prefix + "self_attn.q_proj.lora_B.weight": (32, 4),
        prefix + "mlp.down_proj.lora_A.weight": (4, 48), prefix + "mlp.down_proj.lora_B.weight": (32, 4),
    }  # fmt: skip
    ours = adapters_of(tuned, 4)["layers"]["attention"]["q"]
    np.testing.assert_array_equal(tensors[prefix + "self_attn.q_proj.lora_A.weight"], ours["lora_a"][0].T)
    np.testing.assert_array_equal(tensors[prefix + "self_attn.q_proj.lora_B.weight"], ours["lora_b"][0].T)
    said = json.loads((out / "adapter_config.json").read_text())
    wanted = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["down_proj", "q_proj"], "use_dora": False}
    assert {key: said[key] for key in wanted} == wanted

    config = checkpoint.read_model(tuned / "checkpoints" / "00000004")
    config = dataclasses.replace(config, adapter=Adapter(4, 8.0, ("q", "down")))
    jax.tree.map(np.testing.assert_array_equal, hf.load_adapters(str(out), config), adapters_of(tuned, 4))
    # A run that starts from it begins where the other ended.
    words = on(base, sft_words(base.parent), "run.name=again", "train.steps=1", "lora.targets=[q, down]", f"lora.weights={out}")
    assert train("sft", [*words, "optimizer.learning_rate=1e-12"]) == 0
    begun = adapters_of(base.parent / "again", 1)
    assert_merged(final_params(base.parent / "again"), final_params(base), begun, 8.0)  # its base is not quantized
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), begun, adapters_of(tuned, 4))
    (out / "adapter_config.json").write_text(json.dumps(said | {"r": 8}))
    with pytest.raises(UserError, match="adapter_config.json: its content is not what"):
        hf.load_adapters(str(out), config)
    (out / "SHA256SUMS").unlink()
    for changes, message in (
        ({"r": 8}, "set lora.rank=8"), ({"lora_alpha": 16}, "set lora.alpha=16 and lora.scaling=rank"),
        ({"use_dora": True}, "set lora.kind=dora"), ({"lora_alpha": "x"}, "lora_alpha is 'x', which is no number"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    ):  # fmt: skip
        (out / "adapter_config.json").write_text(json.dumps(said | changes))
        with pytest.raises(UserError) as error:
            hf.load_adapters(str(out), config)
        assert message in str(error.value)
    (out / "adapter_config.json").write_text(json.dumps(said))
    halves = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    (out / "adapter_model.safetensors").write_bytes(in_bfloat16(halves))
    found = hf.load_adapters(str(out), config)["layers"]["attention"]["q"]["lora_a"][0]
    np.testing.assert_array_equal(found, ours["lora_a"][0].astype(jnp.bfloat16).astype(np.float32))
    save_file(tensors | {prefix + "mlp.up_proj.lora_A.weight": np.zeros((4, 32), np.float32)}, out / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"mlp.up_proj.lora_A.weight, which is no adapter of lora.targets \(q, down\)"):
        hf.load_adapters(str(out), config)
    capsys.readouterr()
    assert cli.convert(["to-peft", str(base), str(tmp_path / "none")]) == 2
    assert "holds a whole model" in capsys.readouterr().err


def test_grpo_has_the_base_for_its_reference(base, tmp_path, monkeypatch):
    """At the first step the KL to the base, in NF4 as the policy's own, is 0, later it is not; no second copy is read."""
    monkeypatch.setattr(Setup, "reference_params", lambda *_: pytest.fail("the reference was read again"))
    words = on(base, grpo_words(tmp_path), "lora.base=nf4", "kl.coef=0.1", "train.steps=2", "optimizer.schedule=constant")
    assert train("grpo", words) == 0
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    kls = [line["kl"] for line in lines if line["step"]]
    assert abs(kls[0]) < 1e-6 < 1e-5 < kls[1]
    assert lines[-1]["sampler_gap_max"] < 1e-2


def test_adapters_learn_from_a_teacher_and_are_what_is_compared(base, tmp_path):
    """On-policy distillation from another model; and losses are compared on such a model."""
    other = tmp_path / "other"
    checkpoint.save_params(other / "checkpoints", init(TINY_MODEL, jax.random.key(1)), TINY_MODEL)
    load("embedded").save(other / "tokenizer")
    distill = ["loss.name=distill", f"teacher.weights={other}", "teacher.divergence=forward_kl"]
    words = on(base, grpo_words(tmp_path), "lora.base=nf4", "optimizer.schedule=constant", "optimizer.learning_rate=0.03")
    assert train("grpo", [*words, *distill, "train.steps=6"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["step"]]
    assert losses[-1] < 0.95 * losses[0]
    argv = ["--config", "grpo", "--losses", "bnpo,gspo", "--offline", "--out", str(tmp_path / "compared"), *words]
    assert cli.compare(argv) == 0
    compared = json.loads((tmp_path / "compared" / "offline.json").read_text())["points"]["start"]
    assert all(row["grad_norm"] > 0 for row in compared["rows"]) and 0.1 < compared["cosine"][0][1] < 1 - 1e-6


REFUSED = {
    "lora.alpha is of adapters, and there are none: set lora.rank": ("sft", ["lora.rank=null", "lora.alpha=8"]),
    "lora.rank: adapters change a model that is there": ("sft", ["model.weights=null", "model.preset=embedded-tiny"]),
    "train.freeze: beside adapters everything is frozen already": ("sft", ["train.freeze=[embedding]"]),
    "lora.targets names one twice": ("sft", ["lora.targets=[q, q]"]),
    "reference.refresh_every: beside adapters": ("sft", ["loss.name=psft", "reference.refresh_every=8"]),
    "kl.refresh_every does not combine with lora.rank": ("grpo", ["kl.coef=0.1", "kl.refresh_every=8"]),
    "kl.offload does not combine with lora.rank": ("grpo", ["kl.coef=0.1", "kl.offload=true"]),
    "teacher.weights does not combine with lora.rank": ("grpo", ["teacher.weights=start"]),
    "rollout.sampler does not combine with lora.rank": ("grpo", ["rollout.sampler=mine.py:sampler"]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_combine_is_refused_by_name(message):
    algorithm, words = REFUSED[message]
    with pytest.raises(UserError) as error:
        cfg.load(algorithm, ["model.preset=null", "model.weights=runs/sft", "lora.rank=4", *words])
    assert message in str(error.value)


def test_the_state_holds_moments_of_adapters_alone():
    """The state that a run is compiled for is the one that it makes; the base's leaves have no moments and 4 FLOPs, not 6."""
    config, mesh = config_of(), make_mesh(cfg.Mesh(), jax.devices()[:1])
    optimizer = opt.make(cfg.Optimizer(), 10)
    abstract = states.abstract(config, optimizer, mesh)
    adapters = states.draw_adapters(config, PARAMS, mesh, seed=0)
    state = states.adopt(jax.tree.map(jnp.copy, PARAMS), config, optimizer, mesh, adapters=adapters)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    count = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # L r (in + out) of q, o; k, v; gate, up, down
    assert sum(x.size for x in jax.tree.leaves(state.params)) == count == 3712
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * count
    frozen = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # the table, and L of each matrix
    assert weight_flops_per_token(CONFIG) == 6 * frozen and weight_flops_per_token(config) == 4 * frozen + 6 * count
