"""MGRPO's second turn (arXiv 2506.04746): the policy is shown its own answer and a doubt, and answers again."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jaxreason.data.chat import Chat
from jaxreason.data.prompts import Prompt
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.rl.sequence import Sequence as Sampled
from jaxreason.text import THINK_CLOSE, THINK_OPEN, without_marks

SPARE = 32  # tokens by which a completion's text may grow when it is tokenized again as part of a prompt


def again(prompt: Prompt, completion: str, phrase: str, chat: Chat, tokenizer: Tokenizer) -> Prompt:
    """The second turn's prompt: the user's turn is ``{q}<think>{o}</think>{phrase}``; gold and columns stay.

    Control tokens that the policy wrote are left out of it: they would end the user's turn.
    """
    user = f"{prompt.user}\n{THINK_OPEN}\n{without_control(completion, tokenizer)}\n{THINK_CLOSE}\n{phrase}"
    text = chat.render_prompt(prompt.instead(user))
    return dataclasses.replace(prompt, ids=tuple(tokenizer.encode(text)), text=without_marks(text))


def phrase_tokens(phrases: Sequence[str], chat: Chat, tokenizer: Tokenizer) -> int:
    """Most tokens by which the second turn's prompt is longer than the first turn's and its completion together."""
    blank = Prompt((), "", "", "", 0)
    return max(len(again(blank, "", phrase, chat, tokenizer).ids) for phrase in phrases) + SPARE


def phrase_of(phrases: Sequence[str], seed: int, step: int, index: int) -> str:
    """The phrase of completion ``index`` of a step, a function of these numbers alone."""
    return phrases[int(np.random.default_rng([seed, step, index]).integers(len(phrases)))]


def is_right(sequence: Sampled) -> bool:
    """Whether the first reward function gave 1 (or more)."""
    return _graded(sequence) >= 1.0


def is_trained(sequence: Sampled, train: str) -> bool:
    """Whether a correction is trained under ``second_turn.train``; one that confirms a right answer is as right as any."""
    return train == "all" or (train == "verified" and is_right(sequence))


def metrics(firsts: Sequence[Sampled], corrections: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    """The paper's Acc.t1, Acc.t2, their difference, and the shares of answers that were mended and that were broken.

    ``corrections[i]`` are those of ``firsts[i]``; each is one trial, unless one of the two could not be graded.
    """
    trials = [(_graded(first), _graded(s)) for first, group in zip(firsts, corrections) for s in group]
    graded = np.array([pair for pair in trials if not np.isnan(pair).any()]).reshape(-1, 2)
    return changes(graded[:, 0] >= 1.0, graded[:, 1] >= 1.0)


def changes(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """From booleans of equal shape; all 0 where there is none."""
    count = max(len(before), 1)
    t1, t2 = before.sum() / count, after.sum() / count
    return {
        "accuracy_t1": float(t1),
        "accuracy_t2": float(t2),
        "correction_gain": float(t2 - t1),
        "incorrect_to_correct": float((~before & after).sum() / count),
        "correct_to_incorrect": float((before & ~after).sum() / count),
    }


def _graded(sequence: Sampled) -> float:
    """What the first reward function gave; NaN: it could not grade."""
    return next(iter(sequence.rewards.values()))


def without_control(text: str, tokenizer: Tokenizer) -> str:
    """A text that a policy wrote, fit for a prompt: without control tokens, which would end the user's turn."""
    text = without_marks(text)
    pattern = re.compile("|".join(map(re.escape, tokenizer.control)) or "(?!)")
    while (cut := pattern.sub("", text)) != text:  # taking one out may join the halves of another
        text = cut
    return text
