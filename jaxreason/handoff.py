"""What a run is to people who were not there: where its weights come from, how it was trained, and what it measured.

Nothing of it is a path of this machine.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxreason import checkpoint, hf
from jaxreason import config as cfg
from jaxreason.data import files
from jaxreason.data.directory import read_json
from jaxreason.data.remote import shown
from jaxreason.paths import protocol
from jaxreason.weights import WeightSource

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")  # how the hub's cache names what it downloaded
_DATA_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(:.*)?")
_LICENSE, _LANGUAGE = re.compile(r"[a-z0-9][a-z0-9.+-]*"), re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
_MOST_STAGES = 20


def lineage(source: WeightSource) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], WeightSource]:
    """(config, summary) of the runs that led to ``source``, the first one first, and the oldest weights that are still there."""
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    while source.kind == "checkpoint" and (source.run / "config.yaml").is_file() and len(runs) < _MOST_STAGES:
        config = cfg.read_run(source.run / "config.yaml")
        summary = source.run / "summary.json"
        runs.append((config, read_json(summary) if summary.is_file() else {}))
        start = _started_from(config)
        if start is None or not Path(start).exists():
            break
        source = WeightSource.at(start)
    return runs[::-1], source


def _started_from(config: Mapping[str, Any]) -> str | None:
    return (config.get("resolved") or {}).get("weights")


def source_dtype(source: WeightSource) -> str:
    """The dtype of what training started from, or of the checkpoint where that is narrower or the start is not known.

    Weights that were bfloat16 before they were trained in float32 are wanted as bfloat16 again.
    """
    saved = checkpoint.read_model(source.path).execution.param_dtype
    _, oldest = lineage(source)
    if oldest.kind == "hf":
        began = hf.stored_dtype(oldest.path)
    else:
        began = checkpoint.read_model(oldest.path).execution.param_dtype
    return "bfloat16" if "bfloat16" in (saved, began) else saved


def card_of(source: WeightSource) -> dict[str, Any]:
    """The sections of the model card (:func:`jaxreason.hf.card.model_card`) that a run's files give."""
    runs, oldest = lineage(source)
    if not runs:
        return {}
    first, (last, summary) = runs[0][0], runs[-1]
    data = [found for config, _ in runs for found in _data(config)]
    card = {
        "title": (last.get("run") or {}).get("name", "Reasoning model"), "base_model": base_model(first), "start": _start(first),
        "datasets": list(dict.fromkeys(name for name, linked in data if linked)),
        "stages": [stage(config, found) for config, found in runs],
        "recipe": recipe(last, summary), "evaluation": evaluation(last, summary),
        "system_prompt": (last.get("data") or {}).get("system_prompt"),
    }  # fmt: skip
    return card | (_of_base(oldest.path / "README.md") if oldest.kind == "hf" else {})


def base_model(config: Mapping[str, Any]) -> str | None:
    """The hub id that a run's weights came from."""
    given, found = (config.get("model") or {}).get("weights"), _started_from(config)
    if found is not None:
        match = _SNAPSHOT.search(found)
        return f"{match[1]}/{match[2]}" if match else None
    return given if given and not given.startswith(("runs/", "/", ".", "~")) and not Path(given).exists() else None


def _start(config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    if model.get("weights") is None:
        return f"random weights ({model.get('preset') or 'an unknown preset'})"
    return "weights that are not on the hub"


def _of_base(readme: Path) -> dict[str, Any]:
    """License and languages that the model card of the base names; nothing where it names none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        found = metadata_load(readme) or {} if readme.is_file() else {}
    except (ValueError, yaml.YAMLError):
        return {}
    spoken = found.get("language")
    languages = [spoken] if isinstance(spoken, str) else spoken if isinstance(spoken, list) else []
    languages = [each for each in languages if isinstance(each, str) and _LANGUAGE.fullmatch(each)]
    license = found.get("license")
    known = {"license": license} if isinstance(license, str) and _LICENSE.fullmatch(license) else {}
    return known | ({"language": languages} if languages else {})


def _data(config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What a run trained on, its mixture included, and whether each is the id of a data set on the hub."""
    data = config.get("data") or {}
    return [_named(str(part.get("source") or "unknown data")) for part in (data, *(data.get("mixture") or ()))]


def _named(name: str) -> tuple[str, bool]:
    if name.startswith(("embedded:", "reasoning-gym:")):
        return name, False
    if protocol(name) is not None:
        found = re.match(r"hf://datasets/([^/@]+/[^/@]+)", name)
        return (found[1], True) if found else (shown(name), False)
    match = _DATA_ID.fullmatch(name)
    if match and Path(name).suffix not in files.SUFFIXES and not files.exists(name):
        return match[1], True
    return f"the local {Path(name).name}", False


def _plain(name: str) -> str:
    """The name of a function without the folder that its file is in."""
    return name.rsplit("/", 1)[-1]


def stage(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """A sentence: ``SFT (loss nll) on embedded:arithmetic: 700 steps, 853,089 tokens.``"""
    loss = _plain((config.get("loss") or {}).get("name") or "unknown")
    tokens = f", {summary['trained_tokens']:,.0f} tokens" if "trained_tokens" in summary else ""
    steps = f": {summary['step']:,} steps{tokens}" if "step" in summary else ", not finished"
    sources = ", ".join(name for name, _ in _data(config))
    return f"{str(config['algorithm']).upper()} (loss {loss}) on {sources}{steps}."


def recipe(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run learns, in words."""
    loss, optimizer = config.get("loss") or {}, config.get("optimizer") or {}
    options = {key: value for key, value in (loss.get("options") or {}).items() if "/" not in str(value)}
    warm = optimizer.get("warmup_steps") or optimizer.get("warmup_fraction") or 0
    found = {
        "algorithm": str(config["algorithm"]).upper(),
        "loss": " ".join([_plain(loss.get("name") or "unknown"), *(f"{key}={value}" for key, value in options.items())]),
        "steps": summary.get("step"),
        "learning rate": f"{optimizer['learning_rate']:g}, {optimizer['schedule']}, warm-up {warm:g}" if optimizer else None,
        "weight decay": optimizer.get("weight_decay"),
        "gradient norm at most": optimizer.get("max_grad_norm"),
    }
    lora = config.get("lora") or {}
    if lora.get("rank"):
        base = lora.get("base", "param")
        rounded = "" if base == "param" else f" as they were rounded to {base}"
        found["adapters"] = f"{lora['kind']}, rank {lora['rank']}, alpha {lora['alpha']:g}, merged into the weights{rounded}"
    found |= _of_grpo(config) if "rollout" in config else _of_sft(config)
    return found | {"seed": (config.get("run") or {}).get("seed")}


def _of_sft(config: Mapping[str, Any]) -> dict[str, Any]:
    data = config.get("data") or {}
    return {"batch": f"{data['batch_size']} rows of {data['max_length']} tokens"} if "batch_size" in data else {}


def _of_grpo(config: Mapping[str, Any]) -> dict[str, Any]:
    rollout, reward = config["rollout"], (config.get("reward") or {}).get("functions") or []
    named = [(term, 1.0) if isinstance(term, str) else (term["name"], term.get("weight", 1.0)) for term in reward]
    return {
        "batch": f"{rollout['prompts_per_step']} prompts × {rollout['group_size']} completions",
        "sampling": f"temperature {rollout['temperature']:g}, at most {rollout['max_completion_tokens']} tokens",
        "advantage": (config.get("advantage") or {}).get("name") and _plain(config["advantage"]["name"]),
        "rewards": ", ".join(f"{_plain(name)} × {weight:g}" for name, weight in named),
        "KL coefficient": (config.get("kl") or {}).get("coef"),
    }


def evaluation(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run measured of held-out problems and rows, with intervals."""
    data, settings = config.get("data") or {}, config.get("eval") or {}
    held_out = _named(str(data.get("eval_source") or data.get("source")))
    found: dict[str, Any] = {"loss": summary["eval_loss"]} if "eval_loss" in summary else {}
    for name, key in (("accuracy", "eval_accuracy"), ("before", "before_eval_accuracy"), ("change", "eval_change")):
        ends = [key, f"{key}_low", f"{key}_high"]
        if all(isinstance(summary.get(end), int | float) for end in ends):
            found[name] = tuple(float(summary[end]) for end in ends)
    if "accuracy" in found:
        found |= {"task": held_out[0], "problems": summary.get("eval_problems"),
                  "max_completion_tokens": settings.get("max_completion_tokens")}  # fmt: skip
    return found
