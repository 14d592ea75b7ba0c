"""The overrides of build_data.py. A key's docstring is its documentation everywhere."""

from typing import Literal

from pydantic import Field, model_validator

from jaxreason.config.grpo import Reward
from jaxreason.config.schema import Decode, Fraction, NonNegative, Positive

# What a model that reads and writes text cannot do, and programs, of which a model otherwise proposes little else (2212.10560).
_REFUSED = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot", "go to",
            "write a program")  # fmt: skip


class Curate(Decode):
    """What both ways of build_data.py share."""

    split: str = "train"
    """Split of a source that has splits."""
    max_rows: Positive | None = None
    """Use only the first rows of the source."""
    against: list[str] = Field([])
    """Evaluation sets that no kept row may share a run of words with: benchmarks (NAME or NAME=PATH) and sources of problems,
    of which the split ``eval`` or ``test`` is read."""
    ngram: Positive = 13
    """Words in such a run (GPT-3: 13)."""


class Instruct(Curate):
    """Overrides of build_data.py --seeds: Self-Instruct (arXiv 2212.10560)."""

    temperature: float = Field(0.7, ge=0)
    """Of the proposals of new instructions; 0: greedy."""
    top_p: float = Field(0.5, gt=0, le=1)
    """Of the proposals, too."""
    instance_temperature: float = Field(0.0, ge=0)
    """Of the instances; 0: greedy."""
    instructions: Positive = 100
    """It ends with this many new instructions."""
    proposals: Positive | None = None
    """It ends after this many lists of proposals, whatever they held; null: as many as ``instructions``."""
    together: Positive = 16
    """Lists that are drawn at the same time: none of them shows what another one found."""
    seeds_shown: Positive = 6
    """Seed tasks that a list is shown first; it gets more of them while there are too few others."""
    made_shown: NonNegative = 2
    """Tasks of the model's own that a list is shown first."""
    shots: NonNegative = 3
    """Seed tasks of either kind that are shown where the kind or instances of a task are asked for."""
    instances: Positive = 5
    """At most this many instances of an instruction."""
    rouge_below: float = Field(0.7, gt=0, le=1)
    """The ROUGE-L of an instruction with every seed and every earlier one is below this."""
    min_words: Positive = 4
    max_words: Positive = 150
    """Words of an instruction."""
    refused: list[str] = Field(list(_REFUSED))
    """An instruction with one of these words is left out."""

    @model_validator(mode="after")
    def _lengths(self):
        if self.max_words < self.min_words:
            raise ValueError(f"max_words={self.max_words} is below min_words={self.min_words}: no instruction can be kept")
        return self


class Build(Curate):
    """Overrides of build_data.py --source: which prompts, how traces are drawn and verified, and which are kept."""

    temperature: float = Field(1.0, ge=0)
    """0: greedy."""
    row_schema: str = Field("auto", alias="schema")
    """Row format of the source; auto: detected from the columns."""
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
