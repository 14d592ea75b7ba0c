"""The overrides of build_data.py. A key's docstring is its documentation everywhere."""

from typing import Literal

from pydantic import Field, model_validator

from jaxreason.config.grpo import Reward
from jaxreason.config.schema import Decode, Fraction, NonNegative, Positive


class Build(Decode):
    """Overrides of build_data.py: which prompts, how traces are drawn and verified, and which are kept."""

    temperature: float = Field(1.0, ge=0)
    """0: greedy."""
    split: str = "train"
    """Split of a source that has splits."""
    row_schema: str = Field("auto", alias="schema")
    """Row format of the source; auto: detected from the columns."""
    max_rows: Positive | None = None
    """Use only the first rows of the source."""
    keep_columns: list[str] = Field([])
    """Columns of a row that your reward function reads as ``sample.row[name]``."""
    max_prompt_tokens: Positive | None = None
    """Problems with a longer prompt are left out and counted."""
    reward: Reward = Reward()
    """The functions that verify a trace."""
    min_reward: float = 1.0
    """The least weighted sum of rewards of a trace that is kept."""
    min_tokens: NonNegative = 0
    """Least tokens of a trace, the stop token included."""
    max_tokens: Positive | None = None
    """Most tokens of a trace; null: what it could be drawn with."""
    format: Literal["think", "r1", "any"] = "think"
    """``think``: ``<think>…</think>`` once, then an answer; ``r1``: the answer in ``<answer>`` tags; ``any``: no demand."""
    language: Literal["en", "zh", "ja", "ko", "ru", "ar", "he", "hi", "el", "th"] | None = None
    """The language of the thought, told by its letters; null: any."""
    min_language: Fraction = 0.9
    """Least share of the thought's words in ``language``."""
    against: list[str] = Field([])
    """Evaluation sets that no kept row may share a run of words with: benchmarks (NAME or NAME=PATH) and sources of problems,
    of which the split ``eval`` or ``test`` is read."""
    ngram: Positive = 13
    """Words in such a run (GPT-3: 13)."""
    max_rouge: Fraction | None = None
    """A trace is left out if its ROUGE-L with a kept one is above this; null: only if it is the same text."""
    rouge_with: Literal["prompt", "all"] = "prompt"
    """The kept traces that it is compared with: of the same prompt, or all (which takes the square of their number)."""
    per_prompt: Positive | None = None
    """At most this many traces of a prompt; null: all."""
    prefer: Literal["shortest", "random"] = "shortest"
    """Which of a prompt's traces come first: those of the fewest tokens, or by the seed."""

    @model_validator(mode="after")
    def _lengths(self):
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} is below min_tokens={self.min_tokens}: no trace can be kept")
        return self
