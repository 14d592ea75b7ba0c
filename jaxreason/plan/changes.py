"""What would fit: the nearest changes to a config that does not, each compiled."""

import dataclasses

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.plan import programs
from jaxreason.plan.options import Options, fit_batch, microbatch, shape_of, ways
from jaxreason.targets import load


def changes(name: str, words: list[str], options: Options, worst: str, wanted: int = 3, tries: int = 8) -> list[dict]:
    """The nearest changes that fit, of different kinds: the first ``wanted`` of at most ``tries``.

    ``worst``: the program that needs most as things are. It is compiled first, and no other if it still does not fit.
    """
    config = cfg.load(name, words)
    found, enough = [], set()
    for extra, devices in candidates(config, options, worst)[:tries]:
        keys = (devices > options.devices, *(word.partition("=")[0] for word in extra))
        if keys in enough:  # a smaller step of the same kind fits
            continue
        changed = dataclasses.replace(options, devices=devices)
        try:
            there, fitted = fit_batch(name, [*words, *extra], changed)
            total, fits = _largest(there, changed, worst)
        except UserError:
            continue
        found.append({"words": [*extra, *fitted], "devices": devices, "total": total, "fits": fits})
        if fits:
            enough.add(keys)
        if len(enough) == wanted:
            break
    return found


def _largest(config: cfg.RunConfig, options: Options, worst: str) -> tuple[int, bool]:
    """Bytes of the largest program, and whether all fit; of those compiled until one does not."""
    limit, total = load(options.target).limit_bytes, 0
    planned = programs.of(shape_of(config, options)).planned
    for name in sorted(planned, key=lambda name: name != worst):
        total = max(total, planned[name].compile().total_bytes + sum(planned[name].beside.values()))
        if total > limit:
            return total, False
    return total, True


def candidates(config: cfg.RunConfig, options: Options, worst: str) -> list[tuple[list[str], int]]:
    """(words, devices), from what costs nothing to what costs most; only what ``worst`` has any need of."""
    least = ways(config.mesh, options.hosts * options.devices)
    decoding = worst.rpartition(" ")[2] in ("prefill", "decode", "weights")
    single = []
    if config.optimizer.moment_dtype == "float32":
        single.append(["optimizer.moment_dtype=bfloat16"])
    if not decoding and microbatch(config, least) > least:
        single.append([f"train.microbatch_size={least}"])
    order = ["none", "matmuls", "attention", "full"]
    lighter = [] if decoding else order[order.index(config.model.remat) + 1 :]
    remat = [[f"model.remat={policy}"] for policy in lighter]
    fewer = [*_slots(config, worst), *_away(config, worst), *_frozen(config)] if decoding else _frozen(config)
    combined = [[word for change in single for word in change]] if len(single) > 1 else []
    together = [[*(word for change in single for word in change), *change] for change in [*remat, *fewer]] if single else []
    here = [(change, options.devices) for change in [*single, *fewer, *remat, *combined, *together]]
    more: list[tuple[list[str], int]] = [([], options.devices * factor) for factor in (2, 4, 8) if options.devices * factor <= 8]
    return [*here[:5], *more[:1], *here[5:], *more[1:]]


def _slots(config: cfg.RunConfig, worst: str) -> list[list[str]]:
    """Half and a quarter of the slots that decode: of the evaluation where that is what needs most."""
    if isinstance(config, cfg.SftConfig) or worst.startswith("evaluation"):
        name, slots = "eval.slots", config.eval.slots
    elif config.rollout.slots == "auto":
        return []
    else:
        name, slots = "rollout.slots", config.rollout.slots
    return [[f"{name}={slots // part}"] for part in (2, 4) if slots >= part]


def _away(config: cfg.RunConfig, worst: str) -> list[list[str]]:
    """The train state in host memory while completions are drawn; an evaluation keeps it."""
    if isinstance(config, cfg.SftConfig) or config.rollout.offload_state or worst.startswith("evaluation"):
        return []
    return [["rollout.offload_state=true"]]


def _frozen(config: cfg.RunConfig) -> list[list[str]]:
    """A reference or teacher in host memory, or no reference."""
    if config.algorithm == "sft":
        return []
    found = []
    if config.kl.coef:
        found += [["kl.coef=0"]] if config.kl.offload else [["kl.offload=true"], ["kl.coef=0"]]
    if config.teacher.weights and not config.teacher.offload:
        found.append(["teacher.offload=true"])
    return found
