"""What an export says of the run that it was made of: dtype, origin, evaluation; and that no path of this machine is in it."""

import json

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open

from jaxreason import checkpoint, cli, hf, model
from jaxreason import config as cfg
from jaxreason.data.tokenizer import load
from jaxreason.hf.card import model_card

SIZES = {"num_layers": 1, "embed_dim": 32, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
SUMMARY = {"step": 40, "trained_tokens": 12345.0, "eval_loss": 0.25, "eval_accuracy": 0.6, "eval_accuracy_low": 0.5,
           "eval_accuracy_high": 0.7, "eval_problems": 100, "before_eval_accuracy": 0.4, "before_eval_accuracy_low": 0.3,
           "before_eval_accuracy_high": 0.5, "eval_change": 0.2, "eval_change_low": 0.06, "eval_change_high": 0.33,
           "grad_norm": 0.123456}  # fmt: skip


MIXTURE = "data.mixture=[{source: Owner/more, weight: 0.5}, {source: 'embedded:arithmetic'}]"


def random_params(config: model.ModelConfig) -> dict:
    """init's tree drawn by numpy, since compiling init takes longer than these tests."""
    shapes, rng = jax.eval_shape(lambda: model.init(config, jax.random.key(0))), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jax.device_put(0.2 * rng.standard_normal(leaf.shape, np.float32)), shapes)


def make(folder, name: str, weights, words=(), summary=None):
    """A finished run that started from ``weights``, without the training."""
    tokenizer = load("embedded")
    config = model.preset("embedded-tiny", SIZES).replace(param_dtype="float32", stop_ids=tokenizer.stop_ids)
    run = folder / name
    checkpoint.save_params(run / "checkpoints", random_params(config), config)
    tokenizer.save(run / "tokenizer")
    start = [] if weights is None else ["model.preset=null", f"model.weights={weights}"]
    found = cfg.load(*(words[:1] or ("sft",)), [f"run.name={name}", *start, *words[1:]])
    resolved = cfg.Resolved(weights=None if weights is None else str(weights))
    (run / "config.yaml").write_text(cfg.dump(found.model_copy(update={"resolved": resolved})))
    if summary:
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def stored(directory) -> set[str]:
    with safe_open(directory / "model.safetensors", "np") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def base(tmp_path):
    """bfloat16 weights as the hub's cache has them, with a license."""
    path = tmp_path / "models--Owner--Base-1B" / "snapshots" / "0123"
    config = model.preset("embedded-tiny", SIZES)
    hf.save(random_params(config), config, path, dtype="bfloat16", tokenizer=load("embedded"),
            card={"license": "llama3.2", "language": ["en", "de"]})  # fmt: skip
    return path


def test_an_export_says_where_it_comes_from_and_what_was_measured(tmp_path, base):
    first = make(tmp_path, "first", base, ("sft", "data.source=Owner/traces", MIXTURE), {"step": 700})
    words = ("grpo", f"data.source={tmp_path}/my.jsonl", "data.eval_source=embedded:arithmetic", "loss.name=grpo")
    last = make(tmp_path, "last", checkpoint_of(first), words, SUMMARY)
    assert cli.convert(["to-hf", str(last), str(tmp_path / "out")]) == 0
    assert stored(tmp_path / "out") == {"BF16"}  # two runs in float32 later
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "Owner/Base-1B" and card.data.license == "llama3.2" and card.data.language == ["en", "de"]
    assert card.data.datasets == ["Owner/traces", "Owner/more"] and card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("embedded:arithmetic", 0.6) and "0.500 to 0.700" in result.metric_name
    text = str(card)
    assert "**60.0 % (50.0 to 70.0)** of 100 held-out problems of `embedded:arithmetic`" in text
    assert "it was 40.0 % (30.0 to 50.0), which is a change of +20.0 points (+6.0 to +33.0)." in text
    assert "1. SFT (loss nll) on Owner/traces, Owner/more, embedded:arithmetic: 700 steps.\n2. GRPO" in text
    assert "2. GRPO (loss grpo) on the local my.jsonl: 40 steps, " in text
    assert str(tmp_path) not in text and "0.123" not in text and "{'" not in text
    assert "max_new_tokens=128" in text and "| learning rate | 0.0001, constant, warm-up 5 |" in text
    assert cli.convert(["to-hf", str(last), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert stored(tmp_path / "wide") == {"F32"}


def checkpoint_of(run):
    (step,) = (run / "checkpoints").iterdir()
    return step


def test_random_weights_stay_as_they_were_and_nothing_is_invented(tmp_path):
    run = make(tmp_path, "sft", None)
    assert cli.convert(["to-hf", str(run), str(tmp_path / "out")]) == 0
    assert stored(tmp_path / "out") == {"F32"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None and card.data.base_model is None and card.data.eval_results is None
    assert "starting from random weights (embedded-tiny)" in str(card) and "This model was not evaluated" in str(card)


def test_a_snippet_cannot_leave_its_block():
    prompt = 'a\n```\n<script>"'
    text = model_card(model.preset("embedded-tiny", SIZES), "bfloat16", {"system_prompt": prompt})
    code = text.partition("```python\n")[2].partition("```")[0]
    assert text.count("```") == 2 and "do_sample=False" in code
    messages = code.partition("messages = ")[2].partition("]\n")[0] + "]"
    assert eval(messages)[0] == {"role": "system", "content": prompt}
