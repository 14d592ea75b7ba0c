"""Inputs that nobody means, from a seed: whatever a door is given, it answers, or raises UserError (or what the system refused).

Every input is a function of (door, number), so that a failure is made again by these two.
"""

import contextlib
import copy
import json
import math
import random
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_helpers
import jax
import numpy as np
import yaml

from jaxreason import config as cfg
from jaxreason import hf, model
from jaxreason.config.text import read_yaml
from jaxreason.data import chat as chats
from jaxreason.data.encode import Encoder
from jaxreason.data.files import chunks
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HOSTILE = [
    None, True, False, 0, -1, 1, 2, 10**9, 2**31, 2**63, 10**400, 0.0, -0.5, 1e-320, 1e308, math.inf, -math.inf, math.nan,
    "", " ", "0", "-1", "nan", "1e400", "\0", "\ud800", "a\ud800b", "x" * 300, "y" * 5000, "../x", "/", "~", "~nobody/x",
    "gs://b/x", "s3://", "a:b", ":", "null", "<|eot_id|>",
    "<think>", "</think>", "{{ x }}", "{% for", "é\u2028\x85", "\U0001f600",
    [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [1, "a", None, []], ["x"] * 50, {"name": 3}, [{"name": "a"}],
    [{"role": "user"}], "2024-01-01", "0x10", "1_000", "!!int x", "*a", "&a 1",
]  # fmt: skip


PIECES = [
    b"{", b"}", b"[", b"]", b":", b"- ", b"\n", b"\t", b'"', b"\x00", b"\xff", b"\xef\xbb\xbf", b"&a ", b"*a",
    b"!!python/object:os.system ", b"1e999", b"nan", b"{{", b"{%", b"%}", b"\\ud800", b"null",
]  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CHATS = [
    data_helpers.trace(3), {"prompt": "1+1?", "completion": "<think>\ntwo\n</think>\n\n2"}, {"text": "a b"},
    {"question": "1+1?", "answer": "#### 2"}, {"problem": "1+1?", "solution": "\\boxed{2}", "answer": "2"},
    {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
]  # fmt: skip


def hostile(rng: random.Random, depth: int = 0) -> Any:
    """A value that does not belong anywhere; now and then a deep one."""
    if rng.random() < 0.02:
        value: Any = "x"
        for _ in range(rng.choice([5, 50, 400])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if depth < 2 and rng.random() < 0.1:
        return {rng.choice(["a", "name", "role", ""]): hostile(rng, depth + 1) for _ in range(2)}
    return copy.deepcopy(rng.choice(HOSTILE))


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths of everything in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(value: Any, rng: random.Random) -> Any:
    """``value`` with one to three things in it replaced, removed, added or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        every = list(places(value))
        if not every:
            return hostile(rng)
        *parents, last = rng.choice(every)
        node = value
        for key in parents:
            node = node[key]
        kind = rng.random()
        if kind < 0.6:
            node[last] = hostile(rng)
        elif kind < 0.75:
            del node[last]
        elif isinstance(node, dict):
            node[rng.choice([str(last) + "x", "", "zzz", str(last).upper(), "a.b"])] = hostile(rng)
        else:
            node.insert(last, hostile(rng))
    return value


def scrambled(text: bytes, rng: random.Random) -> bytes:
    """Bytes with some of them changed, removed, repeated or cut off."""
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        kind = rng.random()
        if kind < 0.35 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind < 0.55:
            del data[at : at + rng.choice([1, 3, 20])]
        elif kind < 0.75:
            data[at:at] = rng.choice(PIECES)
        elif kind < 0.9:
            data[at:at] = data[at : at + rng.choice([5, 50])]
        else:
            del data[at:]
    return bytes(data)


def dumped(value: Any, rng: random.Random) -> bytes:
    """JSON text of a changed value, or the text itself changed."""
    if rng.random() < 0.7:
        return json.dumps(changed(value, rng)).encode("utf-8", "surrogatepass")
    return scrambled(json.dumps(value).encode(), rng)


def model_files(folder: Path) -> dict[str, dict]:
    """A tiny Llama's directory, without sums, and its JSON files."""
    config = model.make_config(
        "llama", vocab_size=40, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, bos_id=1,
        stop_ids=(2, 7), rope_scaling=model.RopeScaling("llama3", 32.0),
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    hf.save(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes), config, folder, dtype="float32")
    (folder / "SHA256SUMS").unlink()
    return {path.name: json.loads(path.read_bytes()) for path in folder.glob("*.json")}


class Doors:
    """What can be given to jaxreason, each door a method of (rng, a folder of its own)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bases = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("sft", "grpo")}
        self.keys = {name: cfg.keys(cfg.ALGORITHMS[name]) for name in self.bases}
        self.files = model_files(folder / "model")
        self.tokenizer = data_helpers.llama(TEMPLATE)
        self.tokenizer.save(folder / "tokenizer")
        (folder / "tokenizer" / "SHA256SUMS").unlink(missing_ok=True)
        self.tokenizer_files = {path.name: json.loads(path.read_bytes()) for path in (folder / "tokenizer").glob("*.json")}
        self.encoder = Encoder(self.tokenizer, chats.resolve(self.tokenizer), keep_only_correct=False, spans=True)

    def yaml_text(self, rng: random.Random) -> None:
        """The text of a config file."""
        name = rng.choice([*self.bases])
        text = scrambled((CONFIGS / f"{name}.yaml").read_bytes(), rng)
        values = read_yaml(text, "config.yaml")
        if isinstance(values, dict):
            cfg.dump(cfg.build(values))

    def config_values(self, rng: random.Random) -> None:
        """The values of a config file."""
        values = changed(self.bases[rng.choice([*self.bases])], rng)
        if isinstance(values, dict):
            cfg.dump(cfg.build(values))

    def overrides(self, rng: random.Random) -> None:
        """``key=value`` on the command line."""
        name = rng.choice([*self.bases])
        words = []
        for _ in range(rng.choice([1, 2, 3])):
            key = rng.choice(self.keys[name])
            key = rng.choice([key, key, key, key[:-1], f"{key}.x", key.split(".")[0], f".{key}", f"{key}..", ""])
            value = hostile(rng)
            text = value if isinstance(value, str) and rng.random() < 0.5 else json.dumps(value)
            words.append(f"{key}{rng.choice(['=', '=', '=', '', '=='])}{text}")
        cfg.dump(cfg.build(self.bases[name], words))

    def _model(self, name: str, content: bytes) -> None:
        path = self.folder / "model" / name
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            config = hf.read_config(path.parent)
            if name.endswith(".safetensors") or name.endswith("index.json"):
                hf.load(path.parent)
            assert config.arch.num_layers > 0
        finally:
            path.write_bytes(before)

    def config_json(self, rng: random.Random) -> None:
        """config.json of a model's directory."""
        self._model("config.json", dumped(self.files["config.json"], rng))

    def generation_config_json(self, rng: random.Random) -> None:
        """generation_config.json of a model's directory."""
        self._model("generation_config.json", dumped(self.files["generation_config.json"], rng))

    def safetensors_header(self, rng: random.Random) -> None:
        """The header of a file of weights, its length, or a piece of the file."""
        path = self.folder / "model" / "model.safetensors"
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        if rng.random() < 0.6:
            header = dumped(json.loads(content[8 : 8 + size]), rng)
            length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2**63, len(header) + 5])
            content = struct.pack("<Q", length) + header + content[8 + size :]
        else:
            content = scrambled(content[: 8 + size], rng) + content[8 + size :]
        self._model("model.safetensors", content)

    def tokenizer_files_of(self, rng: random.Random) -> None:
        """One of the JSON files of a tokenizer's directory."""
        name = rng.choice([*self.tokenizer_files])
        path = self.folder / "tokenizer" / name
        before = path.read_bytes()
        path.write_bytes(dumped(self.tokenizer_files[name], rng))
        try:
            load(path.parent).encode("a b")
        finally:
            path.write_bytes(before)

    def template(self, rng: random.Random) -> None:
        """A chat template."""
        text = scrambled(rng.choice([TEMPLATE, (chats.TEMPLATES / "r1_zero.jinja").read_text()]).encode(), rng)
        path = self.folder / "mine.jinja"
        path.write_bytes(text)
        chats.resolve(self.tokenizer, str(path))

    def rows(self, rng: random.Random) -> None:
        """Rows of a JSONL file."""
        path = self.folder / "rows.jsonl"
        path.write_bytes(b"\n".join(dumped(rng.choice(CHATS), rng) for _ in range(3)))
        for chunk in chunks(path):
            if done := self.encoder.chunk(chunk, "auto").rejects:
                raise UserError(str(done))


DOORS = [name for name, value in vars(Doors).items() if callable(value) and not name.startswith("_")]


def fuzz(doors: Doors, door: str, numbers: range) -> tuple[int, list[str]]:
    """(inputs that were refused, what else was raised) of one door's inputs ``numbers``."""
    refused, failed = 0, []
    call: Callable = getattr(doors, door)
    for number in numbers:
        try:
            with contextlib.redirect_stdout(None):
                call(random.Random(f"{door} {number}"))
        except (UserError, OSError):
            refused += 1
        except BaseException as error:  # tokenizers' panics are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)
            ours = next((f for f in reversed(where) if "/jaxreason/" in f.filename), where[-1])
            place = f"{Path(ours.filename).name}:{ours.lineno}"
            failed.append(f"{door} {number}: {type(error).__name__} at {place}: {str(error)[:200]}")
    return refused, failed
