"""Tiny tokenizers for the data tests, made on the spot."""

import functools
import json
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from jaxreason.config import Data
from jaxreason.data.tokenizer import Tokenizer

LLAMA_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]

# The shape of Llama-3.2's own template: a dated system block, user turns trimmed.
DATED_TEMPLATE = (
    "{{- bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# The shape of the R1 distillations' template: opens the thought in the prompt, drops it from assistant turns.
R1_TEMPLATE = (
    "{{- bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{- '<|eom_id|>' + m['content'].split('</think>')[-1].strip() + eos_token }}"
    "{% else %}{{- '[' + m['role'] + ']' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|eom_id|><think>\n' }}{% endif %}"
)


@functools.cache
def _byte_level(special: tuple[str, ...], llama3: bool) -> str:
    backend = Backend(models.BPE())
    # As in Llama-3, line breaks are one piece whatever follows them; GPT-2's rule (below) looks at what follows.
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\w+|[^\s\w]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if llama3 else byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the user asks the assistant to think and answer\n\n"] * 3, trainer)
    if llama3:
        pieces = [(special[0], 0)]
        backend.post_processor = processors.TemplateProcessing(f"{special[0]} $A", special_tokens=pieces)
    return backend.to_str()


def llama(chat_template=None, eos="<|end_of_text|>", generation_config=None, **options) -> Tokenizer:
    """Like Llama-3.2's: byte-level BPE, its special tokens, a BOS that it adds by itself."""
    backend = Backend.from_str(_byte_level(tuple(LLAMA_SPECIAL), True))
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=LLAMA_SPECIAL[0], eos_token=eos, **options)
    hf.chat_template = chat_template
    return Tokenizer(hf, generation_config)


def chatml(chat_template=None) -> Tokenizer:
    """Like SmolLM2's: ChatML tokens, BOS and EOS among them, nothing added by itself."""
    backend = Backend.from_str(_byte_level(("<|im_start|>", "<|im_end|>"), False))
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    hf.chat_template = chat_template
    return Tokenizer(hf)


def sentencepiece_like(chat_template: str) -> Tokenizer:
    """Like Llama-2's and TinyLlama's: a space is put before every text that is encoded."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz0123456789<>/|:+?="))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3}
    vocabulary |= {letter: i for i, letter in enumerate(letters, len(vocabulary))}
    merges = [("a", "b"), ("▁", "ab")]
    vocabulary |= {"ab": len(vocabulary), "▁ab": len(vocabulary) + 1}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.chat_template = chat_template
    return Tokenizer(hf)


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trace(i: int, words: int = 1) -> dict:
    """A ``messages`` row with a thought of about ``words`` words and gold i + 1."""
    reply = f"<think>\n{' '.join(['add'] * words)} {i}\n</think>\n\n{i + 1}"
    turns = [{"role": "user", "content": f"{i} + 1 ="}, {"role": "assistant", "content": reply}]
    return {"messages": turns, "gold": i + 1}


def data_config(root: Path, source: str | Path, **options) -> Data:
    """The data section of a small run, with a token cache below ``root``."""
    defaults = {"max_length": 256, "batch_size": 1, "workers": 0, "cache_dir": str(root / "cache")}
    return Data(source=str(source), **{**defaults, **options})
