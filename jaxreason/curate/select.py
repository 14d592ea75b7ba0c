"""Which traces are kept: filters in one order, and one counted reason for each trace that is left out."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason import config as cfg
from jaxreason.curate.overlap import Contamination, Novelty
from jaxreason.curate.traces import Trace, sample_of
from jaxreason.data import schema
from jaxreason.data.chat import Chat
from jaxreason.data.example import Reject
from jaxreason.data.prompts import Prompt
from jaxreason.rewards.format import format as format_reward
from jaxreason.rewards.language import language as language_reward

Reason = str | None


@dataclasses.dataclass(frozen=True)
class Kept:
    """A trace that becomes a row."""

    prompt: Prompt
    trace: Trace
    pass_rate: float  # the share of the prompt's traces that are right


@dataclasses.dataclass(frozen=True)
class Selection:
    """``drawn`` is ``len(kept)`` and the sum of ``dropped``, whose keys are reasons."""

    drawn: int
    kept: list[Kept]  # in the order of the prompts, the preferred of each first
    dropped: dict[str, int]


def select(
    found: Mapping[str, Prompt], traces: Mapping[str, Sequence[Trace]], options: cfg.Build, chat: Chat, seen: Contamination
) -> Selection:
    """The traces of the prompts (both by the prompts' digests) that pass every filter of ``options``.

    ``seen``: the evaluation sets. A trace is counted for the first reason that holds of it.
    """
    kept, dropped = list[Kept](), collections.Counter[str]()
    overall = Novelty(1.0 if options.max_rouge is None else options.max_rouge)
    for problem, prompt in found.items():
        mine = traces[problem]
        right = sum(trace.reward is not None and trace.reward >= options.min_reward for trace in mine)
        texts, novelty = set[str](), overall
        if options.rouge_with == "prompt":
            novelty = Novelty(1.0 if options.max_rouge is None else options.max_rouge)
        for trace in sorted(mine, key=_preference(options)):
            reason = _unfit(prompt, trace, options, chat, seen) or _repeated(trace, texts, novelty, options)
            if reason is None and options.per_prompt is not None and len(texts) >= options.per_prompt:
                reason = f"more than {options.per_prompt} of a prompt"
            if reason is not None:
                dropped[reason] += 1
                continue
            texts.add(trace.completion)
            if options.max_rouge is not None:
                novelty.add(trace.completion)
            kept.append(Kept(prompt, trace, right / len(mine)))
    return Selection(len(kept) + dropped.total(), kept, dict(dropped))


def _preference(options: cfg.Build) -> Callable[[Trace], Any]:
    """What a prompt's traces are sorted by; the random order of two traces does not depend on what else was drawn."""
    if options.prefer == "shortest":
        return lambda trace: (trace.tokens, trace.sample)
    return lambda trace: hashlib.sha256(f"{options.seed} {trace.problem} {trace.sample}".encode()).digest()


def _unfit(prompt: Prompt, trace: Trace, options: cfg.Build, chat: Chat, seen: Contamination) -> Reason:
    """Why a trace is left out, whatever the others are."""
    if trace.reward is None:
        return "no reward: a function failed, or had none"
    if trace.reward < options.min_reward:
        return f"reward below {options.min_reward:g}"
    if trace.truncated:
        return "not finished within max_completion_tokens"
    if trace.tokens < options.min_tokens:
        return f"shorter than {options.min_tokens} tokens"
    if options.max_tokens is not None and trace.tokens > options.max_tokens:
        return f"longer than {options.max_tokens} tokens"
    sample = sample_of(prompt, trace, options.max_completion_tokens)
    if options.format != "any" and not format_reward(sample, template=options.format):
        return f"not of the format {options.format}"
    if options.language is not None and language_reward(sample, language=options.language) < options.min_language:
        return f"less than {options.min_language:g} of the thought in {options.language}"
    if reason := unreadable(messages_of(prompt, trace), chat):
        return f"SFT could not read it: {reason}"
    if seen.has(prompt.user, trace.completion):
        return f"shares {options.ngram} words in a row with an evaluation set"
    return None


def unreadable(messages: list[dict[str, str]], chat: Chat) -> Reason:
    """Why SFT would not train on a conversation; None: it would."""
    try:
        reply = schema.parse({"messages": messages}, "messages", False).reply
        assert reply is not None  # the conversation ends with it
        chat.check_reply(reply)
    except Reject as reject:
        return reject.reason
    return None


def _repeated(trace: Trace, texts: set[str], novelty: Novelty, options: cfg.Build) -> Reason:
    """Why a trace is left out because of those that are kept."""
    if trace.completion in texts:
        return "the same text as a kept trace of its prompt"
    if options.max_rouge is not None and novelty.refuses(trace.completion):
        return f"ROUGE-L with a kept trace above {options.max_rouge:g}"
    return None


def messages_of(prompt: Prompt, trace: Trace) -> list[dict[str, str]]:
    """The conversation: the row's own system message and earlier turns, the question, and the whole assistant's turn."""
    turns = [] if prompt.system is None else [("system", prompt.system)]
    turns += [*prompt.history, ("user", prompt.user), ("assistant", sample_of(prompt, trace, trace.tokens).transcript)]
    return [{"role": role, "content": text} for role, text in turns]
