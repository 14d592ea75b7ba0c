"""samples.jsonl: what was drawn and what it earned, for people and for the report."""

import json
import math
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax import Array

from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import present
from jaxreason.rl.sequence import Sequence
from jaxreason.train import hosts

_BY_TOKEN = 2  # completions of a step that are written token by token, too: all of them would be most of a run's bytes
_MOST_BYTES = 4  # of a character: a token may hold a part of one


class Samples:
    """samples.jsonl: every completion of process 0 with what it earned, the first ones of a step also by token."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._path, self._tokenizer = folder / "samples.jsonl", tokenizer
        self._file: TextIO | None = None

    def __enter__(self) -> "Samples":
        self._file = open(self._path, "a") if jax.process_index() == 0 else None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()

    def write(self, step: int, sequences: list[Sequence], learner: list[dict[str, Array]]) -> None:
        """One line a completion. ``learner``: ``logp`` and ``entropy`` [B, T] of every minibatch, from its first update.

        They are read after the step's metrics, when the devices have them: nothing waits for a copy."""
        if not self._file:
            return
        shown = [s for s in sequences if s.drawn][:_BY_TOKEN]
        for s in sequences:
            line = {
                "step": step, "group": s.group, "prompt": s.prompt.user, "gold": s.prompt.gold, "completion": s.text,
                "source": s.source, "tokens": len(s.completion.tokens), "truncated": s.completion.truncated,
                "advantage": float(np.mean(s.advantage)), "reward": None if math.isnan(s.reward) else s.reward,
                "rewards": {k: None if math.isnan(v) else v for k, v in s.rewards.items()},
            }  # fmt: skip
            if any(s is each for each in shown):
                line |= by_token(s, self._tokenizer) | of_learner(s, learner)
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def by_token(sequence: Sequence, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """``pieces``: the texts of a completion's tokens, which together are its text and its stop token; ``logp``: the sampler's
    log-prob of each, under its temperature and before top-p and top-k.

    A token that ends within a character has an empty piece, and the one that completes it the character.
    """
    pieces: list[str] = []
    pending: list[int] = []
    for token in sequence.completion.tokens:
        pending.append(int(token))
        text = tokenizer.decode(pending, skip_special_tokens=False)
        whole = not text.endswith("\ufffd") or len(pending) == _MOST_BYTES
        pieces.append(text if whole else "")
        pending = [] if whole else pending
    return {"pieces": pieces, "logp": [round(float(value), 3) for value in sequence.completion.policy_logp]}


def of_learner(sequence: Sequence, learner: list[dict[str, Array]]) -> dict[str, list[float]]:
    """``entropy``: of the distribution that each token was drawn from, nats at the sampler's temperature; ``gap``: the learner's
    log-prob of the token − the sampler's, both before top-p and top-k. Both are the update's own numbers."""
    minibatch, row, columns = present(sequence.place, "Sequence.place")
    logp, entropy = (hosts.rows(learner[minibatch][name])[row, columns] for name in ("logp", "entropy"))
    gap = logp - sequence.completion.policy_logp
    return {"entropy": [round(float(value), 3) for value in entropy], "gap": [float(f"{value:.3g}") for value in gap]}
