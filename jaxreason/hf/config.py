"""``config.json`` and ``generation_config.json`` of Hugging Face, to and from :class:`ModelConfig`.

What is particular to an architecture is in its family's ``hf``. A key that asks for a model that is not ours is an error;
keys that transformers ignores too, such as a tool's version, are ignored.
"""

import dataclasses
from typing import Any

from jaxreason.errors import UserError
from jaxreason.model import FAMILIES, ModelConfig, RopeScaling, family_of, make_config

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_DEFAULT_THETA = 10000.0
# Far beyond any model, and small enough that a wrong one is said before anything is made of that size.
_LIMITS = {"vocab_size": 2**24, "hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 2**12,
           "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14}  # fmt: skip
_MAX_COUNT = 2**31 - 1
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Sampling that the exported directory asks for: DeepSeek-R1's advice for models that reason (arXiv 2501.12948), since
# greedy decoding of long traces tends to repeat itself.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


def config_from_hf(hf: dict, where: str, generation: dict | None = None) -> ModelConfig:
    """The architecture that a ``config.json`` describes; absent keys take the values transformers gives them.

    Args:
      hf: the parsed file, written by transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``).
      where: its path, for messages.
      generation: the parsed ``generation_config.json``; its end-of-sequence ids come before those of ``hf``.

    Raises: UserError naming file, key and value for anything that is not expressible.
    """
    name = _check_supported(hf, where)
    form, absent = FAMILIES[name].hf, FAMILIES[name].hf.defaults
    heads = _count(hf, "num_attention_heads", where)
    embed_dim = _count(hf, "hidden_size", where)
    # An explicit null leaves both to the width and the heads, whatever an absent key means.
    head_dim, kv_heads = (hf.get(key, absent[key]) for key in ("head_dim", "num_key_value_heads"))
    if head_dim is None and embed_dim % heads:
        raise UserError(f"{where}: hidden_size {embed_dim} is not a multiple of num_attention_heads {heads}")
    theta, scaling = _rope(hf, where)
    return make_config(
        name,
        vocab_size=_count(hf, "vocab_size", where),
        embed_dim=embed_dim,
        mlp_dim=_count(hf, "intermediate_size", where),
        num_layers=_count(hf, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=_count(hf, "num_key_value_heads", where, kv_heads or heads),
        head_dim=_count(hf, "head_dim", where, head_dim or embed_dim // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(hf, "rms_norm_eps", where, 1e-6),
        tie_embeddings=_flag(hf, "tie_word_embeddings", where),
        max_positions=_count(hf, "max_position_embeddings", where, absent["max_position_embeddings"]),
        init_std=_number(hf, "initializer_range", where, 0.02),
        bos_id=_bos(hf, where, absent["bos_token_id"]),
        stop_ids=_stop_ids(hf, where, generation or {}, absent["eos_token_id"]),
        **{field: _flag(hf, key, where) for key, field in form.flags.items()},
    )


def config_to_hf(config: ModelConfig, dtype: str) -> dict:
    """The ``config.json`` of ``config`` with weights in ``dtype``, for transformers 4 and 5 alike.

    Raises: UserError where transformers' class cannot be what ``config`` is.
    """
    c, form = config.arch, family_of(config).hf
    if form.even_width and c.embed_dim % c.num_heads:
        raise UserError(
            f"cannot export: embed_dim {c.embed_dim} is not a multiple of num_heads {c.num_heads}, "
            "which transformers refuses even where head_dim is given"
        )
    if not 0.0 <= c.init_std <= 1.0:
        raise UserError(f"cannot export: init_std {c.init_std} is outside 0 … 1, which transformers refuses")
    scaling = _scaling_to_hf(c.rope_scaling)
    return {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        **{key: vars(c)[field] for key, field in form.flags.items()},
        **form.written,
        # transformers 4 reads the first two, transformers 5 writes the third.
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": c.rope_theta},
        "bos_token_id": c.bos_id,
        "eos_token_id": _eos(c.stop_ids),
        "use_cache": True,
        "torch_dtype": dtype,
    }


def generation_to_hf(config: ModelConfig) -> dict:
    """The ``generation_config.json``: every stop id, and sampling that suits long reasoning."""
    return {"bos_token_id": config.arch.bos_id, "eos_token_id": list(config.arch.stop_ids) or None, **SAMPLING}


def _check_supported(hf: dict, where: str) -> str:
    """The name of the family that implements everything that ``hf`` asks for."""
    families = {family.hf.model_type: name for name, family in FAMILIES.items()}
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        raise UserError(f"{where}: model_type is {kind!r}; implemented are {', '.join(families)}")
    form = FAMILIES[families[kind]].hf
    architectures = _texts(hf, "architectures", where) or [form.architecture]
    if form.architecture not in architectures:
        raise UserError(f"{where}: architectures is {architectures}; give a {form.architecture} checkpoint")
    for key, (only, advice) in form.fixed.items():
        value = hf.get(key)
        if value is not None and value != only:
            raise UserError(f"{where}: {key} is {value!r}; {advice}")
    if other := sorted(set(_texts(hf, "layer_types", where)) - {"full_attention"}):
        raise UserError(f"{where}: layer_types has {', '.join(other)}; only full_attention is implemented")
    for key in _REQUIRED:
        if hf.get(key) is None:
            raise UserError(f"{where}: {key} is missing; it is part of every config.json")
    return families[kind]


def _rope(hf: dict, where: str) -> tuple[float, RopeScaling | None]:
    """Theta and rescaling from either spelling; two spellings that disagree are an error."""
    found = [
        _rope_section(hf[key], hf, f"{where}: {key}") for key in ("rope_scaling", "rope_parameters") if hf.get(key)
    ]
    top = _number(hf, "rope_theta", where, None)
    if not found:
        return top or _DEFAULT_THETA, None
    if len(set(found)) > 1 or top not in (None, found[0][0]):
        said = ", ".join(f"{key} {hf[key]}" for key in ("rope_theta", "rope_scaling", "rope_parameters") if hf.get(key))
        raise UserError(f"{where}: {said} disagree: transformers 4 and 5 would each follow another; keep the right one")
    return found[0]


def _rope_section(section: Any, hf: dict, where: str) -> tuple[float, RopeScaling | None]:
    if not isinstance(section, dict):
        raise UserError(f"{where} is {section!r}; it is an object with rope_type")
    kind = section.get("rope_type", section.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(f"{where} has rope_type {kind!r}; implemented are {', '.join(_ROPE_KEYS)}")
    if _number(section, "partial_rotary_factor", where, 1.0) != 1.0:
        raise UserError(
            f"{where} has partial_rotary_factor {section['partial_rotary_factor']}; only 1.0 is implemented"
        )
    known = _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(key for key in section if key not in known and section[key] is not None):
        raise UserError(f"{where} has {unknown[0]} {section[unknown[0]]!r}, which rope_type {kind} does not use")
    theta = _number(section, "rope_theta", where, None) or _number(hf, "rope_theta", where, _DEFAULT_THETA)
    if kind == "default":
        return theta, None
    factor = _number(section, "factor", where)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    # The two places that transformers falls back to when the section does not say it.
    fallback = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings") or 2048
    return theta, RopeScaling(
        "llama3",
        factor,
        low_freq_factor=_number(section, "low_freq_factor", where),
        high_freq_factor=_number(section, "high_freq_factor", where),
        original_max_positions=_count(section, "original_max_position_embeddings", where, fallback),
    )


def _scaling_to_hf(scaling: RopeScaling | None) -> dict | None:
    if scaling is None:
        return None
    fields = dataclasses.asdict(scaling)
    fields["original_max_position_embeddings"] = fields.pop("original_max_positions")
    return {"rope_type": scaling.kind} | {key: fields[key] for key in sorted(_ROPE_KEYS[scaling.kind])}


_MISSING = object()


def _number(section: dict, key: str, where: str, default: Any = _MISSING) -> Any:
    value = section.get(key)
    if value is None:
        if default is _MISSING:
            raise UserError(f"{where} lacks {key}")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:  # NaN is not either
        raise UserError(f"{where}: {key} is {_shown(value)}; it is a positive number")
    return float(value)


def _count(section: dict, key: str, where: str, default: int | None = None) -> int:
    value = section.get(key)
    value = default if value is None else value
    limit = _LIMITS.get(key, _MAX_COUNT)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise UserError(f"{where}: {key} is {_shown(value)}; it is an integer from 1 to {limit}")
    return value


def _texts(section: dict, key: str, where: str) -> list[str]:
    value = section.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {key} is {_shown(value)}; it is a list of names")
    return value


def _shown(value: Any) -> str:
    text = f"a number of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 200 else repr(value)
    return text if len(text) <= 100 else f"{text[:100]} …"


def _flag(section: dict, key: str, where: str) -> bool:
    value = section.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}; it is true or false")
    return bool(value)


def _token_ids(value: Any, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if bad := [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < _LIMITS["vocab_size"]]:
        raise UserError(f"{where} has {_shown(bad[0])}, which is not a token id")
    return ids


def _bos(hf: dict, where: str, default: int | None) -> int | None:
    ids = _token_ids(hf.get("bos_token_id", default), f"{where}: bos_token_id")
    return ids[0] if ids else None


def _stop_ids(hf: dict, where: str, generation: dict, default: int | None) -> tuple[int, ...]:
    """Every id that either file calls end-of-sequence, each once: stopping at one too few never ends."""
    first = _token_ids(generation.get("eos_token_id"), f"{where} (generation_config.json): eos_token_id")
    return tuple(dict.fromkeys(first + _token_ids(hf.get("eos_token_id", default), f"{where}: eos_token_id")))


def _eos(stop_ids: tuple[int, ...]) -> int | list[int] | None:
    return list(stop_ids) if len(stop_ids) > 1 else stop_ids[0] if stop_ids else None
