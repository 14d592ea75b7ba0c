"""README.md of an exported model, as the hub reads it: YAML front matter, then Markdown."""

import re
from typing import Any

import yaml

from jaxreason.errors import UserError
from jaxreason.hf.table import flatten
from jaxreason.model import ModelConfig, family_of, param_count

_SECTIONS = ("title", "license", "base_model", "data", "weights", "recipe", "metrics")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME, which the hub can link


def model_card(config: ModelConfig, dtype: str, card: dict[str, Any]) -> str:
    """A model card; sections that ``card`` lacks are left out, never invented.

    Args:
      config: the exported architecture.  dtype: of the stored weights.
      card: ``title``, ``license``, ``base_model``, ``data`` (text; hub ids are linked in the front matter) and ``weights``
        (text), ``recipe`` and ``metrics`` (nested dicts of plain values, each shown as a table).

    Raises: UserError for an unknown section.
    """
    if unknown := sorted(set(card) - set(_SECTIONS)):
        raise UserError(f"model card section {unknown[0]!r} is unknown; known: {', '.join(_SECTIONS)}")
    base, data = card.get("base_model"), card.get("data")
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxreason", "reasoning"],
        "license": card.get("license"),
        # The hub rejects links that are not ids, such as the path of a local directory.
        "base_model": base if base and _HUB_ID.fullmatch(base) else None,
        "datasets": [data] if data and _HUB_ID.fullmatch(data) else None,
    }
    front = {key: value for key, value in front.items() if value is not None}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {_line(card.get('title', 'Reasoning model'))}\n",
        f"Trained with jaxreason; it opens in transformers as a `{family_of(config).hf.architecture}`.\n",
        _table(
            "Model",
            {"base model": base, "training data": data, "weights": card.get("weights"), **_architecture(config, dtype)},
        ),
        _table("Results", _dotted(card.get("metrics"))),
        _table("Recipe", _dotted(card.get("recipe"))),
    ]
    return "\n".join(part for part in parts if part)


def _architecture(config: ModelConfig, dtype: str) -> dict[str, Any]:
    c, rope = config.arch, config.arch.rope_scaling
    return {
        "parameters": f"{param_count(config):,}",
        "layers × width × mlp": f"{c.num_layers} × {c.embed_dim} × {c.mlp_dim}",
        "heads (key-value)": f"{c.num_heads} ({c.num_kv_heads}) of {c.head_dim}",
        "vocabulary": f"{c.vocab_size:,}, head {'tied' if c.tie_embeddings else 'untied'}",
        "rotary embedding": f"theta {c.rope_theta:g}" + (f", {rope.kind} factor {rope.factor:g}" if rope else ""),
        "positions": f"{c.max_positions:,}",
        "stop ids": ", ".join(map(str, c.stop_ids)) or None,
        "stored as": dtype,
    }


def _dotted(values: dict | None) -> dict[str, Any]:
    return {".".join(map(str, path)): value for path, value in flatten(values or {}).items()}


def _table(heading: str, values: dict[str, Any]) -> str:
    lines = [f"| {_line(key)} | {_cell(value)} |" for key, value in values.items() if value is not None]
    return "\n".join([f"## {heading}\n", "| | |", "|---|---|", *lines, ""]) if lines else ""


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _line(value)


def _line(value: Any) -> str:
    """Text that can break neither out of its table cell nor into HTML: values come from data and command lines."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
