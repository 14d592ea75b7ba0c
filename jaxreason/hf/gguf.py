"""GGUF, the file of llama.cpp, for models with the embedded tokenizer; of all others llama.cpp's own converter makes it.

llama.cpp splits text by rules that are part of its source, chosen by name, and none of them leaves a space at the end of a
word, as ``build_tokenizer.PIECES`` does before a number. So the file declares each word of the embedded vocabulary as
llama.cpp's ``USER_DEFINED``: a text that is one token wherever it occurs. All else is spelled in bytes, as here. Ids are
those of training in every text of the task; elsewhere a word inside a longer one is a token there and bytes here.
"""

import os
from types import ModuleType
from typing import Any

import numpy as np

from jaxreason.data.tokenizer import Tokenizer
from jaxreason.data.tokenizer import load as load_tokenizer
from jaxreason.errors import UserError
from jaxreason.hf.table import flatten
from jaxreason.hf.write import tensors, to_numpy
from jaxreason.locks import Partial
from jaxreason.model import ModelConfig
from jaxreason.model.families.llama import Llama
from jaxreason.model.rope import inverse_frequencies
from jaxreason.paths import local

_OTHERS = "give its Hugging Face directory (of a run: to-hf) to llama.cpp's convert_hf_to_gguf.py"


def save_gguf(params: dict, config: ModelConfig, path: str | os.PathLike, tokenizer: Tokenizer, name: str) -> None:
    """Writes one file of float32 weights, vocabulary and chat template, all or nothing. Raises UserError."""
    check_gguf(config, path, tokenizer)
    gguf, target, leaves = _library(), local(path), flatten(params)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.arch.num_layers)
    with Partial(target) as partial:
        writer = gguf.GGUFWriter(partial.path / target.name, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        _add_architecture(writer, config)
        _add_vocabulary(writer, gguf, config, tokenizer)
        for source in tensors(params, config):
            values = to_numpy(leaves[source.path], source, "float32")
            writer.add_tensor(names.get_name(source.name, (".weight", ".bias")), _pairs(values, source.name, config))
        if config.arch.rope_scaling is not None:
            writer.add_tensor("rope_freqs.weight", rope_factors(config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial.path / target.name, target)


def check_gguf(config: ModelConfig, path: str | os.PathLike, tokenizer: Tokenizer) -> None:
    """Raises UserError where :func:`save_gguf` would, before weights are read."""
    _library()
    if local(path).exists():
        raise UserError(f"{local(path)} exists; give another path or remove it")
    if not isinstance(config.arch, Llama):
        raise UserError(f"cannot write GGUF of family {config.arch.family}; {_OTHERS}")
    if not is_embedded(tokenizer):
        raise UserError(f"cannot write GGUF with another tokenizer than the embedded one; {_OTHERS}")


def is_embedded(tokenizer: Tokenizer) -> bool:
    """Whether it splits texts and numbers their parts as the embedded one does."""
    return tokenizer.hf.backend_tokenizer.to_str() == load_tokenizer("embedded").hf.backend_tokenizer.to_str()


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("to-gguf needs the package gguf: pip install -e '.[gguf]'") from None
    return gguf


def _add_architecture(writer: Any, config: ModelConfig) -> None:
    c = config.arch
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.embed_dim)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.mlp_dim)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)


def _add_vocabulary(writer: Any, gguf: ModuleType, config: ModelConfig, tokenizer: Tokenizer) -> None:
    tokens, kinds = vocabulary(tokenizer, config.arch.vocab_size)
    writer.add_tokenizer_model("gpt2")  # bytes by their printable characters
    writer.add_tokenizer_pre("gpt-2")  # any: whatever it splits is spelled in bytes
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType[kind] for kind in kinds])
    writer.add_token_merges(["! !"])  # llama.cpp asks for a list, gguf writes no empty one; "!!" is no token, so it stays two
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.hf.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_chat_template(tokenizer.hf.chat_template)


def vocabulary(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[str]]:
    """Text and ``gguf.TokenType`` of every id below ``size``."""
    added, backend = tokenizer.hf.added_tokens_decoder, tokenizer.hf.backend_tokenizer
    tokens, kinds = [], []
    for token in range(size):
        text = backend.id_to_token(token)
        if text is None:
            tokens.append(f"[PAD{token}]")
            kinds.append("UNUSED")
        elif token in added:
            tokens.append(text)
            kinds.append("CONTROL" if added[token].special else "USER_DEFINED")
        else:
            tokens.append(text if len(text) == 1 else tokenizer.decode([token]))
            kinds.append("NORMAL" if len(text) == 1 else "USER_DEFINED")
    return tokens, kinds


def rope_factors(config: ModelConfig) -> np.ndarray:
    """What llama.cpp divides the frequencies of the default rope by, [H/2] float32."""
    return inverse_frequencies(config.replace(rope_scaling=None).arch) / inverse_frequencies(config.arch)


def _pairs(values: np.ndarray, name: str, config: ModelConfig) -> np.ndarray:
    """``values``, with each head's channels i and i + H/2 of queries and keys as neighbours, which llama.cpp rotates."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return values
    halves = values.reshape(-1, 2, config.arch.head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
