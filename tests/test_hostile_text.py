"""Templates and configs that are made to hang, fill the memory or break a parser: one message each, in bounded time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import data_helpers
import pytest
import yaml

from jaxreason import cli
from jaxreason import config as cfg
from jaxreason.data import chat as chats
from jaxreason.data import render
from jaxreason.data.example import Example
from jaxreason.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# ---- templates

LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
FAILS = {
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 / 0 }}",
    "range": "{{ range(10**9) | list }}",
    "syntax": "{% if %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "attribute": "{{ messages[0].content.nothing.more }}",
    "refused": "{{ raise_exception('roles must alternate') }}",
    "escape": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "overflow": "{{ 2.0 ** 100000 }}",
    "key": "{{ messages[7]['x'] }}",
}
BOMBS = {
    "memory": "{{ 'a' * 10**11 }}",
    "doubling": "{% set a = 'ab' %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "output": "{% set a = 'ab' * 1000000 %}{% for i in range(50) %}{{ a }}{% endfor %}",
}


def chat(template: str) -> chats.Chat:
    return chats.resolve(data_helpers.llama(template))


@pytest.mark.parametrize("kind", FAILS)
def test_whatever_a_template_raises_is_one_message(kind):
    with pytest.raises(UserError, match="chat template of tokenizer .*set data.template to one that fits") as caught:
        chat(FAILS[kind])
    assert len(str(caught.value)) < 600
    if kind == "refused":
        assert "roles must alternate" in str(caught.value)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_that_would_fill_the_memory_is_refused(kind):
    began = time.monotonic()
    with pytest.raises(UserError, match="MemoryError|for want of memory|characters; at most|Error"):
        chat(BOMBS[kind])
    assert time.monotonic() - began < 30


def test_a_template_that_loops_for_ever_is_killed(monkeypatch):
    monkeypatch.setattr(render, "LIMIT_S", 1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="it takes more than 1 s; set data.template"):
        chat(LOOP)
    assert time.monotonic() - began < 20
    assert chat("{{ bos_token }}{{ messages[0].content }}").render_prompt(Example("x")).endswith("x")  # the next one is served


def test_apart_and_here_are_the_same_text():
    values = {"messages": [{"role": "user", "content": "a\u2028\ufdd0ü"}], "bos_token": "<s>", "add_generation_prompt": True}
    for file in chats.TEMPLATES.glob("*.jinja"):
        assert render.apart(file.read_text(), values) == render.here(file.read_text(), values) != ""


def test_the_process_of_a_killed_run_ends():
    script = (
        "import os, signal; from jaxreason.data import render; render.apart('x', {}); "
        "print(render._process._process.popen.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    until = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}/stat").exists() and time.monotonic() < until:
        if Path(f"/proc/{done.stdout.strip()}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    assert time.monotonic() < until


@pytest.mark.parametrize("content", [b"\xff\xfe{{", b"\x80"])
def test_a_template_file_that_is_not_utf8(content, tmp_path):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError, match="t.jinja: cannot be read as UTF-8 text"):
        chats.resolve(data_helpers.llama(), str(tmp_path / "t.jinja"))


@pytest.mark.parametrize("template", [{"tool": "x", "rag": "y"}, {}, 5])
def test_a_tokenizer_s_template_of_another_kind(template):
    tokenizer = data_helpers.llama()
    tokenizer.hf.chat_template = template
    try:
        found = chats.resolve(tokenizer)
    except UserError as error:
        assert "chat template of tokenizer" in str(error) or "has no chat template" in str(error)
    else:
        assert found.origin.endswith("llama3.jinja")  # nothing is as good as none


# ---- configs

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)
CONFIGS = {
    "bomb": (BOMB, "line 2: not valid YAML: alias *a: write the value out"),
    "recursive": ("run: &a\n  name: *a\n", "alias *a"),
    "merge": ("a: &a {b: 1}\nc:\n  <<: *a\n", "alias *a"),
    "twice": ("algorithm: sft\nrun: {name: x}\nrun: {name: y}\n", "line 3: not valid YAML: key run is given twice"),
    "twice below": ("algorithm: sft\nrun:\n  name: x\n  name: y\n", "line 4: not valid YAML: key name is given twice"),
    "int": ("algorithm: !!int x\n", "a value that cannot be read"),
    "float": ("algorithm: !!float x\n", "a value that cannot be read"),
    "timestamp": ("algorithm: 2024-99-99\n", "a value that cannot be read"),
    "long": ("algorithm: " + "9" * 5000 + "\n", "not valid YAML"),
    "object": ("algorithm: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
    "utf8": (b"algorithm: \xff\n", "not UTF-8 text (byte 11)"),
    "utf16": ("algorithm: sft\n".encode("utf-16"), "not UTF-8 text"),
    "nul": (b"algorithm: s\0ft\n", "not valid YAML"),
    "empty": ("", "the file is empty"),
    "comment": ("# nothing\n", "the file is empty"),
    "list": ("- algorithm: sft\n", "the file is a list"),
    "text": ("sft\n", "the file is a str"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "number key": ("1: 2\n", "key 1 is not text; quote it"),
    "truth key": ("on: 2\n", "key True is not text; quote it"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "algorithm list": ("algorithm: [sft]\n", "algorithm is ['sft']"),
    "tab": ("a:\n\tb: 1\n", "line 2: not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_cannot_be_read_is_one_message(kind, tmp_path, capsys):
    text, message = CONFIGS[kind]
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.monotonic()
    assert cli.train(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and message in error and "Traceback" not in error
    assert time.monotonic() - began < 5


WORDS = {
    "train.steps=true": "train.steps is true: a number is expected, not a truth value",
    "optimizer.learning_rate=yes": "optimizer.learning_rate is true: a number is expected",
    "train.profile_steps=[true, 2]": "train.profile_steps is true: a number is expected",
    "data.source=": "data.source is empty; give it a value",
    "run.dir=": "run.dir is empty",
    "train.steps=!!int x": "a value that cannot be read",
    "train.steps=99999999999999999999": "train.steps",
    "data.batch_size=1e300": "data.batch_size",
    "optimizer.learning_rate=.inf": "optimizer.learning_rate",
    "optimizer.weight_decay=.nan": "optimizer.weight_decay",
    "model.overrides={num_layers: 1, num_layers: 2}": "key num_layers is given twice",
    "train.steps=&a [*a]": "alias *a",
    "train=5": "train",
    "train..steps=5": "unknown key train.",
    "=5": "is not of the form key=value",
    "run.name=a\nb": "run.name",
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_cannot_be_meant_is_one_message(word, capsys):
    assert cli.train(["--config", "sft", "--print-config", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and WORDS[word] in error


def test_truth_values_stay_where_they_are_meant():
    config = cfg.load("sft", ["data.packing=true", "train.tensorboard=true", "loss.options={a: true}", "data.system_prompt="])
    assert config.data.packing is True and config.loss.options == {"a": True} and config.data.system_prompt is None


def test_every_config_that_is_shipped_is_read(tmp_path):
    for path in (ROOT / "configs").rglob("*.yaml"):
        if path.parent.name == "pipeline":
            continue
        config = cfg.load(str(path))
        (tmp_path / "again.yaml").write_text(cfg.dump(config))
        assert cfg.load(str(tmp_path / "again.yaml")) == config
        assert yaml.safe_load(cfg.dump(config))["algorithm"] in cfg.ALGORITHMS
