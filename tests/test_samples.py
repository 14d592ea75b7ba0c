"""samples.jsonl: what is written of a completion, and token by token of the first ones."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.data.prompts import Prompt
from jaxreason.data.tokenizer import load
from jaxreason.rl.samples import Samples, by_token
from jaxreason.rl.sequence import Sequence
from jaxreason.sampler import Completion


def sequence(text: str, tokenizer, number: int = 0, source: str = "policy") -> Sequence:
    tokens = np.array(tokenizer.encode(text), np.int32)
    logp = np.linspace(-2.0, -0.12345, len(tokens), dtype=np.float32)
    completion = Completion(0, number, tokens, logp, logp, False, 0)
    prompt = Prompt((1, 2), "rendered", "7", "asked", 0)
    return Sequence(prompt, completion, text, 0, {"accuracy": 1.0}, 1.0, source=source)


@pytest.mark.parametrize("text", ["12 + 5 = 17", "naïve € 🙂 ", "\n\nend", "\ufffd\ufffd"])
def test_pieces_are_the_text(text):
    """A character of several bytes is one piece, of the token that completes it, whatever tokens it is made of."""
    tokenizer = load("embedded")
    s = sequence(text, tokenizer)
    found = by_token(s, tokenizer)
    assert "".join(found["pieces"]) == tokenizer.decode(s.tokens) and len(found["pieces"]) == len(s.tokens) == len(found["logp"])
    assert all("\ufffd" not in piece for piece in found["pieces"]) or "\ufffd" in text
    assert found["logp"][-1] == -0.123 or len(s.tokens) == 1


def test_the_first_two_that_were_drawn_are_written_by_token(tmp_path):
    tokenizer = load("embedded")
    drawn = [sequence("1", tokenizer, 0, "expert"), *(sequence(f"{i}", tokenizer, i) for i in range(1, 4))]
    # "1" and "2" are one token of log-prob -2: in the second minibatch, row 1, columns 2 and 0.
    drawn[1:3] = [dataclasses.replace(s, place=(1, 1, slice(c, c + 1))) for s, c in zip(drawn[1:3], (2, 0))]
    first = {name: jnp.full((2, 3), 9.0) for name in ("logp", "entropy")}
    second = {"logp": jnp.array([[9.0] * 3, [-2.5, 9.0, -1.99994]]), "entropy": jnp.array([[9.0] * 3, [1.23456, 9.0, 0.5]])}
    with Samples(tmp_path, tokenizer) as samples:
        samples.write(5, drawn, [first, second])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert ["pieces" in line for line in lines] == [False, True, True, False]
    assert [line["step"] for line in lines] == [5] * 4 and lines[1]["pieces"] == ["1"] and lines[0]["prompt"] == "asked"
    assert [line["entropy"] for line in lines[1:3]] == [[0.5], [1.235]]
    assert lines[1]["gap"] == [pytest.approx(6e-5, rel=0.01)] and lines[2]["gap"] == [-0.5] and "gap" not in lines[3]
