"""Import and export of Hugging Face directories: round trips, transformers as the judge, and every refusal."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jaxreason import hf, model
from jaxreason.errors import UserError
from jaxreason.hf.card import model_card
from jaxreason.hf.table import flatten, rows

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
def tiny(family: str = "llama", **changes) -> model.ModelConfig:
    values = dict(
        vocab_size=40, embed_dim=16, mlp_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
        rope_scaling=model.RopeScaling("llama3", 32.0), bos_id=1, stop_ids=(2, 7, 5),
    )  # fmt: skip
    return model.make_config(family, **values | changes)


def random_params(config: model.ModelConfig) -> dict:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), shapes)


def assert_same(found: dict, wanted: dict):
    """Bitwise, dtypes and tree included."""
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=str(path))


@pytest.fixture
def directory(tmp_path):
    """An exported tied float32 model to damage, without the sums that would say so first."""
    config = tiny()
    hf.save(random_params(config), config, tmp_path / "model", dtype="float32")
    (tmp_path / "model" / "SHA256SUMS").unlink()
    return tmp_path / "model"


def edit_json(file, **changes):
    (file.parent / "SHA256SUMS").unlink(missing_ok=True)  # as somebody does who changes an export
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    (directory / "SHA256SUMS").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# round trips

FORMS = [{}, {"attention_bias": True, "mlp_bias": True}, {"family": "qwen2"}, {"family": "qwen3"}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tie", [False, True])
def test_round_trip_is_bitwise(tmp_path, dtype, form, tie):
    config = tiny(tie_embeddings=tie, param_dtype=dtype, **form)
    params = random_params(config)
    hf.save(params, config, tmp_path / "out", dtype=dtype)
    loaded, found = hf.load(tmp_path / "out", param_dtype=dtype)
    assert found == config
    assert_same(loaded, params)
    assert hf.stored_dtype(tmp_path / "out") == dtype
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]  # no temporary left


@pytest.mark.parametrize(("form", "opened"), [*zip(FORMS[1:], ("Llama", "Qwen2", "Qwen3"), strict=True)])
def test_transformers_opens_the_export_and_its_save_loads_back(tmp_path, form, opened):
    """jaxreason -> transformers -> jaxreason, bitwise, in bfloat16, with every stop id."""
    import torch

    config = tiny(tie_embeddings=False, param_dtype="bfloat16", **form)
    params = random_params(config)
    hf.save(params, config, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == f"{opened}ForCausalLM"
    assert theirs.dtype == torch.bfloat16
    assert theirs.generation_config.eos_token_id == [2, 7, 5]
    assert theirs.config.head_dim == 6
    assert theirs.config.rope_parameters == LLAMA3 | {"rope_theta": config.arch.rope_theta}
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, found = hf.load(tmp_path / "theirs", param_dtype="bfloat16")
    assert found == config
    assert_same(loaded, params)


def test_logits_survive_the_export(tmp_path):
    import torch

    config = tiny(rope_scaling=None, rope_theta=1e4)
    params = random_params(config)
    hf.save(params, config, tmp_path / "out", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, 40, (2, 50), dtype=np.int32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = jax.jit(model.logits, static_argnums=1)(params, config, tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_shards_and_index(tmp_path):
    config = tiny(tie_embeddings=False)
    params = random_params(config)
    hf.save(params, config, tmp_path / "one", dtype="float32")
    hf.save(params, config, tmp_path / "many", dtype="float32", shard_bytes=4000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one/model.safetensors")
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for file in files:
        tensors = load_file(file)
        assert sum(x.nbytes for x in tensors.values()) <= 4000
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        for name, values in tensors.items():
            np.testing.assert_array_equal(values, whole.pop(name))
    assert not whole
    assert_same(hf.load(tmp_path / "many")[0], params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), params["head"])


def test_transposes_and_layers_by_hand(directory):
    """The table against the meaning of the names, not against itself."""
    stored = load_file(directory / "model.safetensors")
    params, _ = hf.load(directory)
    assert stored["model.layers.2.self_attn.k_proj.weight"].shape == (2 * 6, 16)
    np.testing.assert_array_equal(
        params["layers"]["attention"]["k"]["kernel"][2], stored["model.layers.2.self_attn.k_proj.weight"].T
    )
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["down"]["kernel"][1], stored["model.layers.1.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(
        params["layers"]["mlp_norm"]["scale"][0], stored["model.layers.0.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["embedding"], stored["model.embed_tokens.weight"])
    assert "lm_head.weight" not in stored
    table = list(rows(tiny(tie_embeddings=False, attention_bias=True, mlp_bias=True)))
    assert len({name for name, *_ in table}) == len({path for _, path, *_ in table}) == len(table) == 19


def test_dtypes_are_cast_as_asked(directory):
    edit_weights(directory, lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))
    params, config = hf.load(directory, compute_dtype="bfloat16")
    assert (config.execution.param_dtype, config.execution.compute_dtype) == ("float32", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    edit_weights(directory, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float16)}))
    assert hf.stored_dtype(directory) == "float32"
    with pytest.raises(UserError, match="param_dtype is 'float16'"):
        hf.load(directory, param_dtype="float16")


# loading straight into shards


def test_each_shard_reads_only_itself(directory):
    """Every leaf, cut along every axis, equals the same cut of the whole."""
    whole = flatten(hf.load(directory)[0])
    seen = []

    def placement(path, leaf):
        for axis, size in enumerate(leaf.shape):
            for part in (slice(0, size // 2), slice(size // 2, None)):
                index = tuple(part if i == axis else slice(None) for i in range(len(leaf.shape)))
                np.testing.assert_array_equal(leaf.read(index), np.asarray(whole[path])[index])
        seen.append(path)
        mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.read)

    params, _ = hf.load(directory, placement=placement)
    assert set(seen) == set(whole)
    assert_same(params, hf.load(directory)[0])


def test_one_leaf_at_a_time(directory, monkeypatch):
    """A leaf is placed before the next is read, and the first layer alone opens no other layer's tensors."""
    events = []
    read = hf.read._Tensor.read

    def logged(tensor, index):
        events.append(tensor.name)
        return read(tensor, index)

    def first_layer(path, leaf):
        events.append("placed")
        return leaf.read((slice(0, 1), *(slice(None) for _ in leaf.shape[1:])))

    monkeypatch.setattr(hf.read._Tensor, "read", logged)
    hf.load(directory, placement=first_layer)
    assert events[::2] == ["placed"] * 11
    assert len(set(events[1::2])) == 11
    assert not any(name.startswith(("model.layers.1.", "model.layers.2.")) for name in events)


# what a directory may not be


def test_tied_head_beside_the_embedding(directory):
    edit_weights(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "head" not in hf.load(directory)[0]
    edit_weights(directory, lambda t: t["lm_head.weight"].__setitem__((39, 15), 7.0))  # in the last row alone
    with pytest.raises(UserError, match=r"lm_head\.weight differs .* tie_word_embeddings true"):
        hf.load(directory)


def test_rotary_buffers_are_ignored(directory):
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(directory, lambda t: t.update({buffer: np.ones(3, np.float32)}))
    hf.load(directory)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight \[24, 16\]"),
        (lambda t: t.update({"score.weight": np.ones(3, np.float32)}), r"model\.safetensors has score\.weight"),
        (lambda t: t.update({"model.norm.weight": np.ones(8, np.float32)}), r"norm\.weight is \[8\].*makes it \[16\]"),
        (lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}), r"norm\.weight is stored as I8"),
        (rename("model.layers.2.input_layernorm.weight", "model.layers.3.input_layernorm.weight"), r"layers\.2\.input"),
    ],
)
def test_wrong_tensors_are_named(directory, change, words):
    edit_weights(directory, change)
    with pytest.raises(UserError, match=words):
        hf.load(directory)


def test_bias_that_the_config_denies(directory):
    edit_weights(directory, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.ones(24, np.float32)}))
    with pytest.raises(UserError, match=r"up_proj\.bias.*mlp_bias"):
        hf.load(directory)


def test_untied_config_without_a_head(directory):
    edit_json(directory / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lm_head\.weight.*tie_word_embeddings"):
        hf.load(directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_named(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        hf.load(directory)


def test_missing_shard_is_named(tmp_path):
    config = tiny()
    hf.save(random_params(config), config, tmp_path / "out", dtype="float32", shard_bytes=8000)
    lost = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}: missing; .*SHA256SUMS"):
        hf.load(tmp_path / "out")
    (tmp_path / "out" / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=f"{lost.name}: no such file"):
        hf.load(tmp_path / "out")


def test_pickles_are_never_opened(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin but no safetensors.*save_pretrained"):
        hf.load(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        hf.load(directory)


def test_damaged_json_is_named(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [2,')
    with pytest.raises(UserError, match=r"generation_config\.json is not valid JSON"):
        hf.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        hf.load(directory)


def test_paths_that_are_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxreason.data.hub.offline", lambda: True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"nobody/nothing: no such directory.*cannot be reached.*hf auth login"):
        hf.load("nobody/nothing")
    with pytest.raises(UserError, match=r"a/b/c: no such directory, and not a hub id"):
        hf.load("a/b/c")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give the directory"):
        hf.load(tmp_path / "file")


def test_gated_and_unknown_hub_models(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(kind):
        def download(*_, **__):
            raise kind.__new__(kind, "a page of text")  # its own __init__ wants a whole HTTP response

        return download

    monkeypatch.setattr("jaxreason.data.hub.offline", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(errors.GatedRepoError))
    with pytest.raises(UserError, match=r"gated: accept its license on https://huggingface\.co/meta/llama, .*hf auth"):
        hf.load("meta/llama")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(errors.RepositoryNotFoundError))
    with pytest.raises(UserError, match="the hub shows no such model: check the name"):
        hf.load("meta/llama")


# saving is all or nothing


@pytest.mark.parametrize("change", [{"embed_dim": 18}, {"init_std": 2.0}])
def test_what_hugging_face_cannot_express_is_named(tmp_path, change):
    config = tiny(**change)
    with pytest.raises(UserError, match=next(iter(change))):
        hf.save({}, config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_targets_in_use_are_refused(tmp_path):
    config = tiny()
    (tmp_path / "out").mkdir()
    hf.save(random_params(config), config, tmp_path / "out")  # empty is fine
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="not an empty directory"):
        hf.save(random_params(config), config, tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("norm"), r"norm\.scale \[16\] is missing"),
        (lambda p: p.update(head=p["embedding"]), "head is not part of the architecture"),
        (lambda p: p.update(embedding=p["embedding"].T), r"embedding is \[16, 40\], expected \[40, 16\]"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, change, words):
    params = random_params(tiny())
    change(params)
    with pytest.raises(UserError, match=words):
        hf.save(params, tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_saving_fails(tmp_path):
    class Broken:
        def save(self, directory):
            raise RuntimeError("no tokenizer")

    with pytest.raises(RuntimeError, match="no tokenizer"):
        hf.save(random_params(tiny()), tiny(), tmp_path / "out", tokenizer=Broken())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 GB free, but the export needs 0\.1 GB"):
        hf.save(random_params(tiny()), tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tokenizer_card_and_permissions(tmp_path):
    class Tokenizer:
        def save(self, directory):
            (Path(directory) / "tokenizer.json").touch()

    card = {"base_model": "meta-llama/Llama-3.2-3B", "recipe": {"steps": 5}}
    hf.save(random_params(tiny()), tiny(), tmp_path / "out", tokenizer=Tokenizer(), card=card)
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json", "SHA256SUMS"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    text = (tmp_path / "out/README.md").read_text()
    assert "\nbase_model: meta-llama/Llama-3.2-3B\n" in text
    assert "| steps | 5 |" in text and "how often it is right is not known" in text


def test_card_is_inert_text():
    text = model_card(tiny(), "bfloat16", {"base_model": "/local/dir", "recipe": {"x": "<script>|\n# y"}})
    assert "base_model:" not in text.split("---")[1]  # no hub id, no link
    assert "| x | &lt;script>\\| # y |" in text
    with pytest.raises(UserError, match="'metric' is unknown"):
        model_card(tiny(), "bfloat16", {"metric": {}})
