"""The one tokenizer wrapper: ids without hidden special tokens, and the stop ids that training and generation share."""

import contextlib
import copy
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxreason.data import hub
from jaxreason.data.directory import SUMS, check_sums, find, read_json, write_sums
from jaxreason.errors import UserError
from jaxreason.locks import Partial
from jaxreason.paths import expanded
from jaxreason.text import LITERAL_CLOSE, LITERAL_OPEN, without_marks

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

EMBEDDED = Path(__file__).resolve().parent / "embedded_tokenizer"
_STOPS = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<|end_of_text|>")
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_MAX_ID = 2**24
_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "generation_config.json",
}  # fmt: skip
_GENERATION = "generation_config.json"  # of these the model's own, which may have come by another way
_OPENED_HERE = ("backend", "is_local", "local_files_only", "name_or_path", "processor_class")  # of a tokenizer_config.json
_PADS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>")


class Tokenizer:
    """A transformers fast tokenizer, without its defaults: nothing is added, cut or padded unless it is said.

    Attributes: hf: the wrapped tokenizer; vocab_size: ids are below it, added tokens included; bos_id: int or None;
    pad_id: what fills unused positions (masks come from lengths, never from it); stop_ids: sorted, generation ends
    with any of them; is_stop: the same as a mask over ids; adds_bos: the tokenizer itself begins texts with BOS.
    """

    def __init__(self, hf: "PreTrainedTokenizerBase", generation_config: dict | None = None):
        self.hf = hf = _fast(hf)
        # tokenizer.json may carry both; rows are cut by data.over_length and padded by the batch, nowhere else.
        hf.backend_tokenizer.no_truncation()
        hf.backend_tokenizer.no_padding()
        self.vocab_size = max(hf.get_vocab().values()) + 1
        if self.vocab_size > _MAX_ID:
            raise UserError(f"tokenizer {hf.name_or_path}: has a token of id {self.vocab_size - 1}; the largest is {_MAX_ID - 1}")
        self.bos_id = hf.bos_token_id
        self.stop_ids = _stop_ids(hf, generation_config or {})
        self.is_stop = np.zeros(max(self.vocab_size, self.stop_ids[-1] + 1), bool)
        self.is_stop[list(self.stop_ids)] = True
        self.pad_id = _pad_id(hf)
        self.adds_bos = self.bos_id is not None and hf("a")["input_ids"][:1] == [self.bos_id]
        self._anchor = self._find_anchor()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; special tokens are only those that it holds."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts; without character offsets, which take a third of the time.

        What a chat has marked as somebody's text (``text.LITERAL_OPEN``) is encoded as the characters that it is. Raises
        UserError for half of a surrogate pair.
        """
        plain = [without_marks(text) for text in texts]
        try:
            encodings = self.hf.backend_tokenizer.encode_batch_fast(plain, add_special_tokens=False)
        except TypeError:
            bad = next((text for text in plain if re.search("[\ud800-\udfff]", text)), "")
            raise UserError(f"{bad[:60]!r} holds half of a surrogate pair, which is no Unicode text; mend or drop it") from None
        ids = [encoding.ids for encoding in encodings]
        for at, text in enumerate(texts):
            if LITERAL_OPEN in text:
                ids[at] = self._encode_marked(text)
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        first, *rest = text.split(LITERAL_OPEN)
        ids = self.encode(first) if first else []
        for part in rest:
            literal, _, after = part.partition(LITERAL_CLOSE)
            anchor = [] if self._anchor is None else self._anchor
            encoded = self._as_text.encode(f"\n{literal}" if anchor else literal, add_special_tokens=False).ids
            ids += encoded[len(anchor) :]
            ids += self.encode_continuations([after])[0] if after else []
        return ids

    @functools.cached_property
    def _as_text(self) -> "Backend":
        """The tokenizer for which special tokens are characters like any other."""
        backend = type(self.hf.backend_tokenizer).from_str(self.hf.backend_tokenizer.to_str())
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def control(self) -> tuple[str, ...]:
        """The texts of control tokens, longest first. The tags of a thought and an answer are text, whatever the tokenizer
        takes them for."""
        added = self.hf.added_tokens_decoder.values()
        found = {t.content for t in added if t.special and t.content.strip("</>") not in ("think", "answer")}
        return tuple(sorted(found, key=lambda text: (-len(text), text)))

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that follow another one. SentencePiece-style tokenizers put a space before every text they
        are given, which a continuation must not get."""
        if self._anchor is None:
            return self.encode_batch(texts)
        return [ids[len(self._anchor) :] for ids in self.encode_batch(["\n" + text for text in texts])]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        ids = [int(i) for i in ids]
        text = self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one list of ids; transformers returns a list for several
        return text

    def save(self, directory: str | Path, chat_template: str | None = None) -> None:
        """Writes the tokenizer's files, with ``chat_template``, which the model was trained with, for its own.

        SHA256SUMS lists them. A reader meanwhile finds each file as it was before or as it is now.
        """
        hf = self.hf if chat_template is None else copy.copy(self.hf)
        if chat_template is not None:
            hf.chat_template = chat_template
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        with Partial(place / "tokenizer") as partial:
            hf.save_pretrained(str(partial.path))
            _portable(partial.path / "tokenizer_config.json")
            write_sums(partial.path)
            for file in sorted(partial.path.iterdir(), key=lambda file: file.name == SUMS):
                os.replace(file, place / file.name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever some text could get other ids."""
        state = [self.hf.backend_tokenizer.to_str(), self.bos_id, self.stop_ids, str(self.hf.special_tokens_map)]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def _find_anchor(self) -> list[int] | None:
        anchor, text, both = self.encode_batch(["\n", "x", "\nx"])
        if both == anchor + text:
            return None
        if both[: len(anchor)] != anchor:
            raise UserError(f"tokenizer {self.hf.name_or_path}: merges a line break with the letter after it")
        return anchor


def load(name_or_dir: str | Path) -> Tokenizer:
    """A tokenizer from a directory, a hub id, or ``embedded``. Raises UserError. Remote code is never run."""
    name = str(name_or_dir)
    path = EMBEDDED if name == "embedded" else expanded(name, "tokenizer")
    if path.exists() or name == "embedded" or not hub.ID.match(name):
        return _load_directory(path)
    offline = hub.offline()
    try:
        hf = _auto_tokenizer().from_pretrained(name, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        state = "the hub cannot be reached and it is not in the local cache" if offline else hub.reason(error)
        raise UserError(f"tokenizer {name}: no such directory, and as a hub id: {state}; {hub.HELP}") from None
    return Tokenizer(hf, _hub_generation_config(name, offline))


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """transformers advises at its import that torch is missing; nothing here needs it."""
    before = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_ADVICE]
        if before is not None:
            os.environ[_NO_ADVICE] = before


def _auto_tokenizer() -> "type[AutoTokenizer]":
    with _without_advice():
        from transformers import AutoTokenizer
    return AutoTokenizer


def _class_for(path: Path) -> "type[AutoTokenizer | PreTrainedTokenizerFast]":
    """What reads ``tokenizer.json`` as it is, where there is one.

    AutoTokenizer would make some model types' own tokenizer of it instead (any directory of a Qwen2 gets Qwen2's rules for
    splitting text), and would follow an ``auto_map`` to code. Its import takes 2 s more than that of the other.
    """
    if not (path / "tokenizer.json").is_file():
        return _auto_tokenizer()
    with _without_advice():
        from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast


def _load_directory(path: Path) -> Tokenizer:
    if not path.is_dir():
        raise UserError(f"tokenizer {path}: no such directory; give a directory with tokenizer.json or a hub id")
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"tokenizer {path}: the directory has no tokenizer.json; copy the tokenizer's files there")
    _refuse_code(path)
    check_sums(path, lambda name: name in _FILES - {_GENERATION})
    check_sums(path, lambda name: name == _GENERATION)
    try:
        hf = _class_for(path).from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return Tokenizer(hf, _generation_config(path))
    except UserError:
        raise
    except BaseException as error:
        # The Rust parser raises bare Exception for a damaged tokenizer.json, and so does its encoder, or a panic, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"tokenizer {path}: cannot be read: {hub.reason(error)}") from None


def _refuse_code(path: Path) -> None:
    """Raises UserError for a directory whose tokenizer is code of its own, or that holds pipes, which would be waited for."""
    for file in sorted(path.iterdir()):
        if file.name in _FILES:
            find(path, file.name)
    if (path / "tokenizer.json").is_file():
        return  # it is all that is read
    for name in ("tokenizer_config.json", "config.json"):
        if (there := find(path, name)) and "auto_map" in read_json(there):
            raise UserError(
                f"tokenizer {path}: {name} asks to run Python code of the directory (auto_map), which is never done; give "
                "one with a tokenizer.json"
            )


def _generation_config(path: Path) -> dict:
    file = find(path, "generation_config.json")
    return read_json(file) if file else {}


def _hub_generation_config(name: str, offline: bool) -> dict:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        path = hf_hub_download(name, "generation_config.json", local_files_only=offline)
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return {}  # many repositories have none; the tokenizer's own stop tokens remain
    return read_json(Path(path))


def _portable(path: Path) -> None:
    """Rewrites a tokenizer_config.json so that transformers 4 and llama.cpp open it: its class and its list of further special
    tokens by the names that every version has, and without what says how it was opened here."""
    found = {key: value for key, value in read_json(path).items() if key not in _OPENED_HERE}
    if isinstance(found.get("extra_special_tokens"), list):  # which transformers 4 takes for names of tokens, and fails
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    path.write_text(json.dumps(found | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1, ensure_ascii=False))


def _fast(hf: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    if not isinstance(hf, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {hf.name_or_path}: needs a fast tokenizer (tokenizer.json), found a slow one")
    return hf


def _stop_ids(hf: "PreTrainedTokenizerFast", generation_config: dict) -> tuple[int, ...]:
    listed = generation_config.get("eos_token_id")
    given = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if bad := [i for i in given if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < _MAX_ID]:
        raise UserError(f"tokenizer {hf.name_or_path}: generation_config.json has eos_token_id {bad[0]!r:.60}, not a token id")
    ids = set(given)
    vocabulary = hf.get_vocab()
    ids |= {hf.eos_token_id, *(vocabulary.get(token) for token in _STOPS)}
    ids.discard(None)
    if not ids:
        raise UserError(f"tokenizer {hf.name_or_path}: has no end-of-text token, so generation could never stop")
    return tuple(sorted(ids))


def _pad_id(hf: "PreTrainedTokenizerFast") -> int:
    vocabulary = hf.get_vocab()
    known = [hf.pad_token_id, *(vocabulary.get(token) for token in _PADS), hf.eos_token_id, 0]
    return next(i for i in known if i is not None)
