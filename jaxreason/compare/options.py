"""What each loss of a comparison was run with: every option, those left at their defaults included."""

import json
from collections.abc import Sequence
from typing import Any

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason.errors import UserError
from jaxreason.report.tables import Table
from jaxreason.rl.objective import bind_loss

_UNKNOWN = "not known"


def effective(config: cfg.RunConfig) -> dict[str, Any]:
    """``values``: every option by name, as the config and its presets decide it; ``changed``: those not at the loss's default.

    Raises UserError for a loss that there is not.
    """
    if not isinstance(config, cfg.GrpoConfig):
        loss = losses.get(config.loss.name, kind="sft", **config.loss.options)
        return _of(loss, {})
    loss = bind_loss(config)
    name = config.advantage.name or loss.advantage or "grpo"
    estimator = losses.advantage.get(name, preset=loss.advantage_preset, **config.advantage.options)
    more: dict[str, Any] = {"preset": config.loss.preset, "advantage": name}
    more |= {f"advantage.{key}": value for key, value in estimator.options.items()}
    more |= {"kl.placement": config.kl.placement or loss.kl_placement, "kl.coef": config.kl.coef}
    return _of(loss, more)


def _of(loss: losses.Loss, more: dict[str, Any]) -> dict[str, Any]:
    known = losses.defaults(loss.name) if loss.name in losses.names() else {}
    changed = [key for key, value in loss.options.items() if key in known and value != known[key]]
    return {"values": {"loss": loss.name, **more, **loss.options}, "changed": changed}


def of_run(config: dict[str, Any]) -> dict[str, Any]:
    """:func:`effective` of a run's config.yaml; where its loss cannot be loaded here, what is written there and why."""
    try:
        return effective(cfg.build(config))
    except UserError as error:
        values = {"loss": config["loss"]["name"], **config["loss"].get("options", {})}
        return {"values": values, "changed": [], "error": str(error)}


def options_table(labels: Sequence[str], found: Sequence[dict[str, Any]]) -> Table:
    """Options by loss, those that differ first."""
    names = list(dict.fromkeys(name for one in found for name in one["values"]))
    names.sort(key=lambda name: len({_word(one, name) for one in found}) == 1)
    rows = [[name, *(_cell(one, name) for one in found)] for name in names]
    records = [{"option": name} | {label: _word(one, name) for label, one in zip(labels, found)} for name in names]
    notes = [
        "As the config, its presets and this version of jaxreason decide them, defaults included; • marks what is not the loss's "
        "own default; an empty cell: the loss has no such option."
    ]
    notes += [f"{label}: {one['error']}; its defaults are {_UNKNOWN}." for label, one in zip(labels, found) if "error" in one]
    return Table("options", "Effective options", ["option", *labels], rows, notes, records)


def _word(one: dict[str, Any], name: str) -> str:
    if name not in one["values"]:
        return ""
    value = one["values"][name]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(one: dict[str, Any], name: str) -> str:
    return _word(one, name) + (" •" if name in one["changed"] else "")
