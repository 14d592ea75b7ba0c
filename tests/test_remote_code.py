"""Whatever door a tokenizer comes in by, no Python file of its directory runs, and nobody is asked whether it may."""

import builtins
import json
import shutil

import jax
import pytest
from helpers import TINY, sft_words

from jaxreason import cli, hf, model
from jaxreason import config as cfg
from jaxreason.convert import from_hf
from jaxreason.data.tokenizer import EMBEDDED, load
from jaxreason.errors import UserError
from jaxreason.model import preset

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
class EvilConfig(PretrainedConfig): model_type = "evil"
"""


def poison(directory, mark, whole: bool) -> None:
    """Adds ``auto_map`` and its file to a tokenizer's directory; without ``whole`` it has no tokenizer.json to read instead."""
    (directory / "evil.py").write_text(EVIL.format(mark=str(mark)))
    (directory / "SHA256SUMS").unlink()
    path = directory / "tokenizer_config.json"  # config.json stays a plain Llama's
    there = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.EvilConfig"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Evil", "auto_map": there}))
    if not whole:
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.json").write_text("{}")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A Hugging Face directory of a tiny model with the embedded tokenizer, and the run that it makes."""
    root = tmp_path_factory.mktemp("clean")
    overrides = cfg.load("sft", TINY).model.overrides
    config = preset("embedded-tiny", overrides)
    hf.save(model.init(config, jax.random.key(0)), config, root / "hf", "float32", load("embedded"))
    from_hf(str(root / "hf"), str(root / "run"))
    return root


@pytest.fixture
def asked(monkeypatch):
    """What was asked on the terminal; the answer is yes."""
    found = []
    monkeypatch.setattr(builtins, "input", lambda *args: found.append(args) or "y")
    return found


DOORS = {
    "model.tokenizer": lambda d, r, t: cli.train(["--config", "sft", "--dry-run", *sft_words(t), f"model.tokenizer={d}"]),
    "model.weights": lambda d, r, t: cli.train(["--config", "sft", "--dry-run", *start(t, d)]),
    "a run's tokenizer": lambda d, r, t: cli.train(["--config", "sft", "--dry-run", *start(t, r)]),
    "teacher.weights": lambda d, r, t: cli.train(
        ["--config", "sft", "--dry-run", *sft_words(t), "loss.name=forward_kl", f"teacher.weights={r}"]
    ),
    "generate": lambda d, r, t: cli.generate(["--model", str(d), "--prompt", "hi", "max_completion_tokens=1"]),
    "generate from a run": lambda d, r, t: cli.generate(["--model", str(r), "--prompt", "hi", "max_completion_tokens=1"]),
    "evaluate": lambda d, r, t: cli.evaluate(["--model", str(r), "--task", "embedded:arithmetic", "problems=1",
                                              "max_completion_tokens=1"]),
    "from-hf": lambda d, r, t: cli.convert(["from-hf", str(d), str(t / "out")]),
    "to-hf": lambda d, r, t: cli.convert(["to-hf", str(r), str(t / "out")]),
}


def start(root, weights) -> list[str]:
    words = [word for word in sft_words(root) if not word.startswith("model.")]
    return [*words, "model.preset=null", "model.overrides={}", f"model.weights={weights}"]


@pytest.mark.parametrize("door", DOORS)
def test_code_of_a_directory_is_refused_by_name(door, clean, tmp_path, asked, capsys):
    shutil.copytree(clean, tmp_path / "copy")
    directory, run, mark = tmp_path / "copy" / "hf", tmp_path / "copy" / "run", tmp_path / "ran"
    for place in (directory, run / "tokenizer"):
        poison(place, mark, whole=False)
    assert DOORS[door](directory, run, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "never" in error and "auto_map" in error
    assert not asked and not mark.exists()


@pytest.mark.parametrize("door", ["generate", "generate from a run", "from-hf", "to-hf"])
def test_a_tokenizer_json_is_read_and_the_code_beside_it_is_not(door, clean, tmp_path, asked, capsys):
    shutil.copytree(clean, tmp_path / "copy")
    directory, run, mark = tmp_path / "copy" / "hf", tmp_path / "copy" / "run", tmp_path / "ran"
    for place in (directory, run / "tokenizer"):
        poison(place, mark, whole=True)
    assert DOORS[door](directory, run, tmp_path) == 0, capsys.readouterr().err
    assert not asked and not mark.exists()


def test_a_tokenizer_class_of_a_library_is_no_code_of_the_directory(tmp_path, asked):
    """``tokenizer_class`` alone names a class of transformers; what is not there is refused."""
    shutil.copytree(EMBEDDED, tmp_path / "plain")
    named = json.dumps({"tokenizer_class": "os.system", "eos_token": "<|eot_id|>"})
    (tmp_path / "plain" / "tokenizer_config.json").write_text(named)
    assert load(tmp_path / "plain").stop_ids and not asked
    (tmp_path / "plain" / "tokenizer.json").unlink()
    (tmp_path / "plain" / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "plain")
