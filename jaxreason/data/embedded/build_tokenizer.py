"""Builds the tokenizer that ships in ``jaxreason/data/embedded_tokenizer``.

Byte-level BPE of Llama 3's kind (``ignore_merges``) with an empty merge table: a word of the task is one token and
everything else is spelled in bytes, so that any text survives ``decode(encode(text))``. Digits are single tokens.
Rebuild after changing a wording: ``python -m jaxreason.data.embedded --rebuild-tokenizer``.
"""

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxreason.data.chat import TEMPLATES
from jaxreason.data.embedded.arithmetic import Arithmetic, generate
from jaxreason.data.tokenizer import EMBEDDED
from jaxreason.text import THINK_CLOSE, THINK_OPEN

MAX_LENGTH = 8192  # max_positions of the preset embedded-tiny
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
THINK = (THINK_OPEN, THINK_CLOSE)  # not special: decoding with skip_special_tokens keeps them for the graders
# A space before a number goes to the word or the mark before it, so that a digit is the same token everywhere and the
# word that says what to do with a number ("buys ") is right before its first digit.
PIECES = r"\\boxed\{|[0-9]| ?[A-Za-z]+(?: (?=[0-9]))?| ?[^\sA-Za-z0-9]+(?: (?=[0-9]))?|\s+"
EXTRA_TEXTS = ("system", "user", "assistant", "\n", "\n\n", " ")


def build_tokenizer() -> Tokenizer:
    """The tokenizer, a function of the task's wordings alone; its size is a multiple of 64."""
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    pieces = {piece for text in _task_texts() for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + sorted(pieces - set(alphabet))
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    spare = -(len(words) + len(THINK) + len(SPECIAL)) % 64
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in THINK])
    reserved = tuple(f"<|reserved_special_token_{i}|>" for i in range(spare))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL + reserved])
    return tokenizer


def tokenizer_files() -> dict[str, str]:
    """File name -> content of a directory that ``transformers.AutoTokenizer.from_pretrained`` opens."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "model_max_length": MAX_LENGTH,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": build_tokenizer().to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": (TEMPLATES / "llama3.jinja").read_text(encoding="utf-8"),
    }


def write_tokenizer(directory: Path = EMBEDDED) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files().items():
        (directory / name).write_text(content, encoding="utf-8", newline="\n")


def _task_texts() -> list[str]:
    """Every wording of the task: 6,000 examples use each of them dozens of times."""
    sample = itertools.islice(generate(Arithmetic(operations=4, careful=0.5), "train", 0), 6000)
    parts = (text for example in sample for text in (example.user, example.think, example.answer))
    return [*EXTRA_TEXTS, *(text for text in parts if text is not None)]
