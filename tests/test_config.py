"""Config errors name the key, the place and the nearest valid key; values survive the round trip."""

import json
import re
import shlex
from pathlib import Path

import jax
import jsonschema
import pytest
import yaml

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.rl.objective import objective_of

ROOT = Path(__file__).resolve().parents[1]
RUNS = [p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "pipeline"]
NAMES = sorted(str(p.relative_to(ROOT / "configs").with_suffix("")) for p in RUNS)
MINIMAL = {
    "algorithm": "sft",
    "run": {"name": "x"},
    "model": {"preset": "embedded-tiny"},
    "data": {"source": "embedded:arithmetic"},
    "train": {"steps": 3},
}


def message(values, words=()):
    with pytest.raises(UserError) as error:
        cfg.build(values, words)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_load_and_round_trip(name):
    config = cfg.load(name)
    assert cfg.build(yaml.safe_load(cfg.dump(config))) == config


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_satisfy_the_schema_for_editors(name):
    jsonschema.validate(yaml.safe_load(cfg.dump(cfg.load(name))), cfg.json_schema())


def test_schema_file_is_current():
    written = json.loads((ROOT / "configs" / "schema.json").read_text())
    assert written == cfg.json_schema(), "run: python -m jaxreason.config > configs/schema.json"


def test_numbers_without_a_dot_are_floats():
    config = cfg.build(MINIMAL, ["optimizer.learning_rate=3e-4", "loss.options={gamma: 1e-2}"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.loss.options == {"gamma": 0.01}


def test_a_word_for_a_text_key_stays_as_typed():
    words = ["run.name=1", "data.system_prompt=Reply: {x", "data.eval_source=null", 'data.template="a: b"']
    config = cfg.build(MINIMAL, words)
    assert (config.run.name, config.data.system_prompt, config.data.eval_source) == ("1", "Reply: {x", None)
    assert config.data.template == "a: b"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optimizer.learning_rat=1"], ["optimizer.learning_rat", "did you mean optimizer.learning_rate?"]),
        (["optimiser.eps=1"], ["unknown key optimiser", "optimizer"]),
        (["optimizer.learning_rate=fast"], ["optimizer.learning_rate is 'fast'", "not a number"]),
        (["data.over_length=cut"], ["data.over_length=cut", "'drop', 'truncate' or 'error'"]),
        (["model.weights=/x"], ["exactly one of model.preset", "model.weights"]),
        (["train.epochs=1"], ["exactly one of train.steps and train.epochs"]),
        (["algorithm=ppo"], ["'ppo'", "sft"]),
        (["nonsense"], ["'nonsense'", "key=value"]),
        (["run.name=a/b"], ["run.name"]),
        (["mesh.fsdp=0"], ["mesh axes are positive"]),
        (["data.batch_size=2.5"], ["data.batch_size", "2.5"]),
        (["run.seed=4294967296"], ["run.seed is 4294967296", "less than 4294967296"]),
    ],
)
def test_errors_name_key_and_fix(words, parts):
    text = message(MINIMAL, words)
    for part in parts:
        assert part in text
    assert len(text.splitlines()) == 1


def test_the_largest_seed_makes_a_key():
    config = cfg.build(MINIMAL, ["run.seed=4294967295"])
    assert jax.random.bits(jax.random.key(config.run.seed)) != jax.random.bits(jax.random.key(0))


def test_resampling_rounds_and_corrections_have_keys_of_their_own():
    """A step has 64 keys: 1 + 62 rounds and the corrections' last one; the next round would be the next step's first."""
    assert cfg.load("grpo", ["rollout.resample_rounds=62"]).rollout.resample_rounds == 62
    with pytest.raises(UserError, match=r"rollout\.resample_rounds=63.*less than or equal to 62"):
        cfg.load("grpo", ["rollout.resample_rounds=63"])


def test_error_in_a_file_names_its_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"data": {"source": "x", "packin": True}}, sort_keys=False))
    with pytest.raises(UserError, match=rf"{path}, line 8: unknown key data.packin; did you mean data.packing"):
        cfg.load(str(path))
    path.write_text("algorithm: [sft\n")
    with pytest.raises(UserError, match="line 2: not valid YAML"):
        cfg.load(str(path))


def test_unknown_config_lists_the_known_ones():
    with pytest.raises(UserError, match=r"--config sfft: no such config; did you mean sft\?; known: .*llama3.2-3b/sft"):
        cfg.load("sfft")


def test_differences_are_by_key():
    old = yaml.safe_load(cfg.dump(cfg.build(MINIMAL)))
    new = yaml.safe_load(cfg.dump(cfg.build(MINIMAL, ["optimizer.b2=0.5", "train.steps=4"])))
    assert cfg.differences(old, new) == {"optimizer.b2": (0.999, 0.5), "train.steps": (3, 4)}


def test_every_recipe_of_the_docs_is_a_config_whose_parts_go_together():
    table = [line for line in (ROOT / "docs" / "recipes.md").read_text().splitlines() if line.startswith("| ")]
    recipes = [shlex.split(words) for line in table if line.count("|") == 6 for words in re.findall("`([^`]*)`", line)]
    recipes = [words for words in recipes if words[0] in cfg.names()]
    assert len(recipes) > 25
    for name, *words in recipes:
        objective_of(cfg.load(name, words))
