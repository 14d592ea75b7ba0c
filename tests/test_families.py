"""What every architecture owes: a rule for each parameter's split, no parameter lost on the way, and whole runs like Llama's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import final_params, grpo_words
from jax.sharding import PartitionSpec

from jaxreason import checkpoint, cli, hf, model
from jaxreason.errors import UserError
from jaxreason.hf.table import flatten
from jaxreason.sharding import RULES, rule

SIZES = dict(vocab_size=64, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)  # fmt: skip
EVERY = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {}}  # with every parameter it can have


def make(family: str, **changes) -> model.ModelConfig:
    return model.make_config(family, **SIZES, tie_embeddings=False, **EVERY[family], **changes)


@pytest.mark.parametrize("family", model.FAMILIES)
def test_every_parameter_has_a_rule(family):
    shapes = flatten(model.shapes(make(family)))
    assert {path: rule(path) for path in shapes if rule(path) is None} == {}
    for path, leaf in shapes.items():
        assert len(rule(path)) <= len(leaf.shape), path


def test_rules_name_what_the_new_families_have(monkeypatch):
    """q's biases go with q's output channels; a rule that is taken away is missed."""
    path = ("layers", "attention", "q", "bias")
    assert rule(path) == PartitionSpec(None, "tensor")
    assert rule(("layers", "attention", "q_norm", "scale")) == PartitionSpec()
    monkeypatch.delitem(RULES, "q.bias")
    assert rule(path) is None


def test_every_family_is_tested_here():
    assert EVERY.keys() == model.FAMILIES.keys()
    assert all(family.architecture.family == name for name, family in model.FAMILIES.items())


@pytest.mark.parametrize("family", model.FAMILIES)
def test_unstacking_loses_no_number(family):
    """Every value of a tree of distinct numbers is in the unstacked tree exactly once."""
    config = make(family)
    leaves, tree = jax.tree.flatten(model.shapes(config))
    ends = np.cumsum([leaf.size for leaf in leaves])
    values = [np.arange(end - x.size, end, dtype=np.float32).reshape(x.shape) for x, end in zip(leaves, ends)]
    found = jax.tree.leaves(model.unstack(jax.tree.unflatten(tree, values), config))
    np.testing.assert_array_equal(np.sort(np.concatenate([np.ravel(x) for x in found])), np.arange(ends[-1]))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("layers", "attention", "q", "lora_a"), "layers.attention.q.lora_a is unknown to the architecture qwen2"),
        (("layers", "attention", "gate", "kernel"), "layers.attention.gate.kernel is unknown"),
        (("layers", "q_norm", "scale"), "layers.q_norm.scale is unknown"),
        (("rotary",), "rotary is unknown"),
    ],
)
def test_a_parameter_that_the_architecture_lacks_is_named(path, words):
    config = make("qwen2")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.shapes(config))
    node = params
    for name in path[:-1]:
        node = node.setdefault(name, {})
    node[path[-1]] = jnp.zeros((2, 3))
    with pytest.raises(UserError, match=words):
        model.unstack(params, config)


def test_a_missing_parameter_is_named():
    config = make("qwen3")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.shapes(config))
    del params["layers"]["attention"]["k_norm"]
    with pytest.raises(UserError, match=r"layers\.attention\.k_norm\.scale is missing for the architecture qwen3"):
        model.unstack(params, config)


def test_a_family_whose_dense_has_more_than_fusing_knows_is_refused(monkeypatch):
    """A family of one's own that adds a leaf to q: the tree is the architecture's own, and still nothing is lost."""
    config = make("qwen2")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.shapes(config))
    params["layers"]["attention"]["q"]["gain"] = jnp.zeros((2, 16))
    monkeypatch.setattr("jaxreason.model.decoder.shapes", lambda _: params)
    with pytest.raises(UserError, match="q has bias, gain, kernel: decoding fuses q, k, v"):
        model.unstack(params, config)


def test_records_change_by_name():
    config = make("qwen2").replace(num_layers=3, compute_dtype="bfloat16")
    assert (config.arch.num_layers, config.execution.compute_dtype) == (3, "bfloat16")
    assert config.replace(num_layers=2, compute_dtype="float32") == make("qwen2")
    assert hash(config) != hash(make("qwen2"))
    for wrong in ({"num_layer": 3}, {"attention_bias": True}):  # Qwen2's biases are no choice
        with pytest.raises(TypeError, match=next(iter(wrong))):
            config.replace(**wrong)
        with pytest.raises(TypeError, match=next(iter(wrong))):
            model.make_config("qwen2", **SIZES, **wrong)


@pytest.mark.parametrize("family", model.FAMILIES)
def test_remat_matmuls_computes_no_product_twice(family):
    """Products of the gradient's program: 28 with ``matmuls`` as without remat; the other policies repeat some."""

    def products(remat: str) -> int:
        config, tokens = make(family, remat=remat, attention="blockwise"), jnp.zeros((1, 8), jnp.int32)
        shapes = model.shapes(config)
        text = str(jax.make_jaxpr(jax.grad(lambda p: model.hidden(p, config, tokens).sum()))(shapes))
        return text.count("dot_general")

    assert products("matmuls") == products("none") < products("attention") < products("full")


# whole runs


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def base(request, tmp_path_factory):
    """A random Qwen as transformers writes it: no bos, end-of-sequence ids in two files."""
    import torch

    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16 if request.param == "qwen3" else 8, initializer_range=0.2, rope_theta=1e6,
        max_position_embeddings=4096, tie_word_embeddings=request.param == "qwen2", eos_token_id=345,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "bias" in name or "norm" in name:
                weight += 0.3 * torch.randn(weight.shape)
    theirs.generation_config.eos_token_id = [345, 349]
    theirs.save_pretrained(path)
    return path


def test_sft_export_and_greedy_text(base, tmp_path, capsys):
    """Trains two steps, exports, and compares logits, greedy text and the way back with transformers."""
    import torch

    words = [
        f"model.weights={base}", "model.preset=null", "model.tokenizer=embedded", "model.compute_dtype=float32",
        f"run.dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", "data.workers=0", "data.max_rows=40",
        "data.max_length=128", "data.batch_size=8", "data.eval_rows=0", "eval.problems=0", "train.steps=2",
        "train.save_every=0", "optimizer.warmup_steps=0", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2",
    ]  # fmt: skip
    assert cli.train(["--config", "sft", *words]) == 0
    run, out = tmp_path / "sft", tmp_path / "hf"
    before = flatten(hf.load(base)[0])
    moved = {path for path, leaf in flatten(final_params(run)).items() if not np.array_equal(leaf, before[path])}
    assert moved == set(before)  # every parameter is trained, biases and norms too
    assert cli.convert(["to-hf", str(run), str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    original = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert type(theirs) is type(original)
    # AutoTokenizer (5.24) makes a Qwen2Tokenizer of whatever tokenizer.json a Qwen2's directory has.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    ids = np.random.default_rng(0).integers(0, 340, (1, 2048))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    params, config = hf.load(out)
    np.testing.assert_allclose(model.logits(params, config, ids), wanted, atol=2e-4)
    capsys.readouterr()
    question = "Compute 37 + 48 - 19."
    assert cli.generate(["--model", str(run), "--prompt", question, "max_completion_tokens=40", "temperature=0"]) == 0
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    drawn = theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    stops = set(theirs.generation_config.eos_token_id)
    assert {345, 349} <= stops
    assert len(set(drawn)) > 3  # a model that repeats one token would agree by chance
    assert capsys.readouterr().out == tokenizer.decode([t for t in drawn if t not in stops]) + "\n"
    assert cli.convert(["from-hf", str(out), str(tmp_path / "back")]) == 0
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "back"), final_params(run))


@pytest.mark.parametrize("base", ["qwen3"], indirect=True)
def test_grpo_and_evaluate_run(base, tmp_path):
    words = [
        f"model.weights={base}", "model.preset=null", "model.overrides={}", "model.tokenizer=embedded", "train.steps=1",
        "rollout.prompts_per_step=2", "rollout.group_size=4",
    ]  # fmt: skip
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words)]) == 0
    (line,) = (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()
    # The engine's own log-probs are those of the training forward pass: cached decoding is the same network.
    assert json.loads(line)["sampler_gap_max"] < 1e-4
    step = checkpoint.steps(tmp_path / "grpo" / "checkpoints")[-1]
    assert checkpoint.read_model(tmp_path / "grpo" / "checkpoints" / f"{step:08d}").arch.family == "qwen3"
    out = tmp_path / "scores"
    task = ["--task", "embedded:arithmetic", "--out", str(out), "problems=2", "max_completion_tokens=8", "slots=2"]
    assert cli.evaluate(["--model", str(tmp_path / "grpo"), *task]) == 0
    assert len((out / "answers.jsonl").read_text().splitlines()) == 2
    tree = ["--strategy", "self_consistency@k=2", "--out", str(tmp_path / "votes.json"), "max_completion_tokens=8", "slots=2"]
    assert cli.generate(["--model", str(tmp_path / "grpo"), "--prompt", "1 + 1 =", *tree]) == 0
    votes = json.loads((tmp_path / "votes.json").read_text())
    assert len(votes["answers"]) == 2 and votes["prompts"] == 1 and 2 <= votes["tokens"] <= 16
    assert json.loads((out / "summary.json").read_text())["embedded:arithmetic"][str(tmp_path / "grpo")]["problems"] == 2
