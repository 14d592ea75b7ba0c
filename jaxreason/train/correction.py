"""MGRPO's second layer (arXiv 2506.04746): the policy is shown its own answer and a doubt, and answers again."""

import dataclasses

import numpy as np

from jaxreason import config as cfg
from jaxreason.data.chat import Chat
from jaxreason.data.example import Example
from jaxreason.data.prompts import Prompt
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.train.rollouts import Sequence

_SPARE = 32  # tokens by which a completion's text may grow when it is tokenized again as part of a prompt


def again(prompt: Prompt, completion: str, phrase: str, chat: Chat, tokenizer: Tokenizer) -> Prompt:
    """The second layer's prompt: the user's turn is ``{q}<think>{o}</think>{phrase}``; gold and columns stay."""
    user = f"{prompt.user}\n<think>\n{completion}\n</think>\n{phrase}"
    text = chat.render_prompt(Example(user))
    return dataclasses.replace(prompt, ids=tuple(tokenizer.encode(text)), text=text)


def longest_prompt(config: cfg.GrpoConfig, longest: int, chat: Chat, tokenizer: Tokenizer) -> int:
    """Most tokens of a second-layer prompt that is corrected; one that comes out longer is left as it is."""
    blank = Prompt((), "", "", "", 0)
    phrases = max(len(again(blank, "", phrase, chat, tokenizer).ids) for phrase in config.correction.phrases)
    return longest + config.rollout.max_completion_tokens + phrases + _SPARE


def phrase_of(phrases: list[str], seed: int, step: int, index: int) -> str:
    """The phrase of completion ``index`` of a step, a function of these numbers alone."""
    return phrases[int(np.random.default_rng([seed, step, index]).integers(len(phrases)))]


def is_right(sequence: Sequence) -> bool:
    """Whether the first reward function gave 1 (or more)."""
    return next(iter(sequence.rewards.values())) >= 1.0


def metrics(firsts: list[Sequence], corrections: list[list[Sequence]]) -> dict[str, float]:
    """The paper's measures: accuracy of both turns, its gain, and how many answers were mended and how many broken.

    ``corrections[i]`` are those of ``firsts[i]``; each is one trial.
    """
    before = np.array([is_right(first) for first, group in zip(firsts, corrections) for _ in group])
    after = np.array([is_right(s) for group in corrections for s in group])
    return changes(before, after)


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
