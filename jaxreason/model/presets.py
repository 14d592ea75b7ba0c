"""Named architectures: ``architectures.yaml``, as configs."""

from pathlib import Path
from typing import Any

import yaml

from jaxreason.errors import UserError
from jaxreason.model.config import ModelConfig, RopeScaling
from jaxreason.model.families import make_config
from jaxreason.plugins import nearest
from jaxreason.types import MAX_SEGMENTS


def _typed(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Plain values of a file or a command line as the fields' types."""
    fields = dict(fields)
    if isinstance(fields.get("rope_scaling"), dict):
        try:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        except TypeError as error:
            raise UserError(f"{where}.rope_scaling: {error}") from None
    if "stop_ids" in fields:
        fields["stop_ids"] = tuple(fields["stop_ids"])
    return fields


_ENTRIES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("architectures.yaml").read_text())
# Hub id → the preset of the same architecture.
HUB: dict[str, str] = {hub_id: name for name, entry in _ENTRIES.items() for hub_id in entry.pop("hub", ())}
PRESETS: dict[str, ModelConfig] = {name: make_config(**_typed(entry, name)) for name, entry in _ENTRIES.items()}


def preset(name: str, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """The named architecture with some fields changed. Raises UserError for unknown names and fields."""
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r} is unknown{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    overrides, config = overrides or {}, PRESETS[name]
    known = vars(config.arch) | {"max_segments": config.execution.max_segments}
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"model.overrides.{key}: no such field of the architecture{nearest(key, known)}")
        wanted = type(known[key])
        if wanted in (int, float, bool) and (isinstance(value, bool) != (wanted is bool) or not isinstance(value, (int, wanted))):
            raise UserError(f"model.overrides.{key} is {value!r}; it is a {wanted.__name__}")
    if overrides.get("max_segments", MAX_SEGMENTS) < MAX_SEGMENTS:
        raise UserError(f"model.overrides.max_segments is below {MAX_SEGMENTS}, which packed rows have; leave it out")
    return config.replace(**_typed(overrides, "model.overrides"))
