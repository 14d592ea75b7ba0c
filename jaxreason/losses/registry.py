"""Losses by name: the built-in ones, and yours by import path."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax import Array

from jaxreason.errors import UserError
from jaxreason.losses import correction, kl, ratio, reduce, sft, variants
from jaxreason.losses.check import reads
from jaxreason.losses.inputs import OPTIONAL_INPUTS, Inputs, PolicyInputs, SftInputs
from jaxreason.losses.policy import BEHAVIOURS, ENTROPY_OVER, KL_RATIOS, policy_loss, shared_metrics
from jaxreason.losses.reduce import whole_step
from jaxreason.losses.suggest import nearest

Kind = Literal["sft", "policy"]

_POLICY_CHOICES = {
    "ratio": ratio.RATIOS,
    "reduce": reduce.REDUCTIONS,
    "kl_estimator": kl.ESTIMATORS,
    "kl_ratio": KL_RATIOS,
    "entropy_over": ENTROPY_OVER,
    "correction": correction.CORRECTIONS,
    "behaviour": BEHAVIOURS,
    "off_policy_behaviour": BEHAVIOURS,
}
_SFT_CHOICES = {"reduce": sft.REDUCTIONS, "level": ("sequence", "token")}


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss with its options bound: ``value, metrics = loss(inputs)``.

    ``value`` is this (micro)batch's contribution to the step's loss, and so are the metrics, except those whose key
    ends in ``_max`` or ``_min``, which combine by maximum and minimum.
    """

    name: str
    options: Mapping[str, Any]
    kind: Kind
    tokenwise: bool  # a sum over tokens of a function of that token's inputs and the totals: any chunk may be evaluated
    needs: frozenset[str]  # optional inputs that it reads
    function: Callable[..., tuple[Array, dict[str, Array]]] = field(repr=False)
    advantage: str | None = None  # the estimator (``jaxreason.losses.advantage``) that belongs to it; sft: None
    advantage_preset: str | None = None
    kl_placement: str = "loss"  # where its KL belongs: ``loss`` or ``reward``
    select: Callable[..., Array] | None = field(default=None, repr=False)
    # select(inputs of the whole step, logp = old_logp, key) -> [B, T] for ``PolicyInputs.selected``
    divergence: Callable[..., Array] | None = field(default=None, repr=False)
    # divergence(student's logits [..., V], teacher's) -> [...] for ``SftInputs.teacher_divergence``

    def __call__(self, inputs: Inputs) -> tuple[Array, dict[str, Array]]:
        expected = SftInputs if self.kind == "sft" else PolicyInputs
        if not isinstance(inputs, expected):
            raise UserError(
                f"loss {self.name} is a {self.kind} loss: it takes {expected.__name__}, not {type(inputs).__name__}"
            )
        return self.function(inputs, **self.options)


def loss(
    *, kind: Kind, tokenwise: bool = False, needs: Iterable[str] | None = None, advantage: str | None = None
) -> Callable[[Callable], Callable]:
    """Declares a function of your own as a loss; see ``get`` for what an undeclared one is taken for.

    Args:
      kind, tokenwise: as in ``Loss``.
      needs: the optional inputs it reads, the others being None; None: found by tracing it.
      advantage: the estimator that belongs to it; None: grpo, if it is a policy loss.
    """

    def declare(function: Callable) -> Callable:
        function.kind, function.tokenwise = kind, tokenwise
        function.needs, function.advantage = needs, advantage
        return function

    return declare


def names(kind: Kind | None = None) -> list[str]:
    """The built-in losses."""
    policy = [] if kind == "sft" else list(variants.VARIANTS)
    return ([] if kind == "policy" else list(sft.SFT_LOSSES)) + policy


def defaults(name: str) -> dict[str, Any]:
    """Every option of a built-in loss with its default."""
    if name in variants.VARIANTS:
        return variants.VARIANTS[name].defaults()
    per_token, changed, _ = sft.SFT_LOSSES[name]
    return sft.OPTIONS | variants.keyword_defaults(per_token) | _divergence_options(name) | changed


def get(name: str, *, kind: Kind | None = None, preset: str | None = None, **options: Any) -> Loss:
    """The loss ``name`` with ``options``.

    Args:
      name: a built-in (``names()``), ``package.module:function`` or ``path/to/file.py:function``. A function of your
        own takes (inputs, **options) and returns (scalar, metrics). It may be declared with ``@losses.loss(...)``;
        otherwise its kind follows the annotation of its first parameter (without one: ``kind``, or policy), it is not
        tokenwise, and it is given every optional input that it reads.
      kind: the kind that the caller trains with; None: any.
      preset: ``trl``, ``verl`` or ``nemo``: that framework's conventions (``docs/losses.md``); ``options`` win over it.

    Raises:
      UserError: unknown name, option, preset or choice, with the nearest valid one; a loss of the other kind.
    """
    found = _find(name, kind, preset, options)
    if kind is not None and found.kind != kind:
        raise UserError(f"loss {name} is a {found.kind} loss, but a {kind} loss is wanted: {', '.join(names(kind))}")
    return found


def _find(name: str, kind: Kind | None, preset: str | None, options: dict[str, Any]) -> Loss:
    if ":" in name:
        if preset is not None:
            raise UserError(f"loss.preset {preset} applies to the built-in losses, not to {name}")
        return _custom(name, kind, options)
    if name not in names():
        raise UserError(
            f"loss.name {name!r} is unknown{nearest(name, names())}; built-in: {', '.join(names())}; "
            "your own: package.module:function or path/to/file.py:function"
        )
    known = defaults(name)
    for key, value in options.items():
        _check_option(name, key, value, known)
    if name in sft.SFT_LOSSES:
        if preset is not None:
            raise UserError(f"loss.preset {preset} applies to policy losses; {name} is a supervised loss")
        return _sft(name, known | options)
    if preset is not None and preset not in variants.PRESETS:
        raise UserError(f"loss.preset {preset!r} is unknown; it is one of {', '.join(variants.PRESETS)}")
    conventions = {} if preset is None else variants.preset_options(preset, name, known | options)
    return _policy(name, known | conventions | options, preset)


def _divergence_options(name: str) -> dict[str, Any]:
    return variants.keyword_defaults(sft.DIVERGENCES[name]) if name in sft.DIVERGENCES else {}


def _sft(name: str, options: dict[str, Any]) -> Loss:
    per_token, _, needs = sft.SFT_LOSSES[name]
    apart = {key: options[key] for key in _divergence_options(name)}

    def function(inputs: SftInputs, **bound: Any) -> tuple[Array, dict[str, Array]]:
        return sft.sft_loss(inputs, per_token=per_token, **{k: v for k, v in bound.items() if k not in apart})

    return Loss(
        name=name,
        options=options,
        kind="sft",
        tokenwise=options["reduce"] == "token-mean" and options.get("level") != "sequence",
        needs=needs | ({"logsumexp"} if options["z_loss_coef"] else frozenset()),
        function=function,
        divergence=functools.partial(sft.DIVERGENCES[name], **apart) if name in sft.DIVERGENCES else None,
    )


def _policy(name: str, options: dict[str, Any], preset: str | None) -> Loss:
    variant = variants.VARIANTS[name]
    correction.check_bounds(options["correction"], options["correction_min"], options["correction_max"])
    if options["reduce"] == "token-sum/const" and options["max_completion_tokens"] is None:
        raise UserError(
            f"loss {name}: reduce token-sum/const divides by a constant; set loss.options.max_completion_tokens"
        )
    if name == "vespo" and options["ratio"] != "token":
        raise UserError("loss vespo forms the sequence ratio itself; leave its option ratio at token")
    if name == "vespo" and options["correction"] not in ("none", "tis", "icepop"):
        raise UserError(
            f"loss vespo takes the correction into its sequence ratio, token by token: correction is "
            f"{options['correction']}; use tis or icepop"
        )
    rule = variants.step_rule(variant, options)
    rule_keys = variants.keyword_defaults(variant.select) if variant.select else {}
    needs = {
        "ref_logp": options["kl_coef"] != 0,
        "sampler_logp": options["correction"] != "none"
        or options["behaviour"] == "sampler"
        or (options["off_policy_threshold"] is not None and options["off_policy_behaviour"] == "sampler"),
        "entropy": options["entropy_coef"] != 0 or options["top_entropy"] is not None,
        "group_tokens": options["reduce"] == "prompt-mean",
        "selected": rule is not None,
    }

    def function(inputs: PolicyInputs, **bound: Any) -> tuple[Array, dict[str, Array]]:
        bound = {key: value for key, value in bound.items() if key not in rule_keys}
        return policy_loss(inputs, surrogate=variant.surrogate, select=rule, **bound)

    return Loss(
        name=name,
        options=options,
        kind="policy",
        tokenwise=False,
        needs=frozenset(key for key, needed in needs.items() if needed),
        function=function,
        advantage="rloo" if preset == "nemo" and variant.advantage == "grpo" else variant.advantage,
        advantage_preset=preset,
        kl_placement=variant.kl_placement,
        select=None if rule is None else variants.on_raw(rule),
    )


def _custom(name: str, wanted: Kind | None, options: dict[str, Any]) -> Loss:
    function = _load(name)
    _check_signature(name, function, options)
    kind = getattr(function, "kind", None) or _annotated_kind(function) or wanted or "policy"
    if kind not in OPTIONAL_INPUTS:
        raise UserError(f"loss {name}: kind is {kind!r}; it is sft or policy")
    bound = dict(options)
    needs = getattr(function, "needs", None)
    if needs is None:
        needs = reads(name, function, bound, kind)
    needs = frozenset(needs)
    if unknown := needs - set(OPTIONAL_INPUTS[kind]):
        raise UserError(
            f"loss {name} needs {sorted(unknown)}; a {kind} loss can need {', '.join(OPTIONAL_INPUTS[kind])}"
        )

    def whole(inputs: Inputs, **given: Any) -> tuple[Array, dict[str, Array]]:
        inputs = whole_step(inputs)
        found = function(inputs, **given)
        # Beside a policy loss's own metrics stand those of every policy, so that losses compare; its own names win.
        return (found[0], shared_metrics(inputs) | found[1]) if kind == "policy" and _is_pair(found) else found

    return Loss(
        name=name,
        options=bound,
        kind=kind,
        tokenwise=bool(getattr(function, "tokenwise", False)),
        needs=needs,
        function=whole,
        advantage=getattr(function, "advantage", None) or ("grpo" if kind == "policy" else None),
    )


def _is_pair(found: Any) -> bool:
    """Whether a loss returned (value, metrics); ``check`` says what is wrong with anything else."""
    return isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)


def _load(name: str) -> Callable:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser()
            if not path.is_file():
                raise UserError(f"loss.name {name}: no such file {path.resolve()}")
            spec = importlib.util.spec_from_file_location(f"jaxreason_custom_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's: whatever it raises is theirs to read
        raise UserError(f"loss.name {name}: importing {place} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(
            f"loss.name {name}: {place} has no function {attribute}{nearest(attribute, found)}; "
            f"it has {', '.join(found) or 'none'}"
        )
    return function


def _check_signature(name: str, function: Callable, options: dict[str, Any]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise UserError(f"loss {name} takes no arguments; a loss takes (inputs, **options)")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name: p.default for p in parameters[1:]}
    for key in options:
        if key not in known:
            raise UserError(
                f"loss {name} has no option {key}{nearest(key, known)}; it has: {', '.join(known) or 'none'}"
            )
    missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in options]
    if missing:
        raise UserError(f"loss {name} needs loss.options.{missing[0]}")


def _annotated_kind(function: Callable) -> Kind | None:
    first = next(iter(inspect.signature(function).parameters.values()))
    annotation = first.annotation
    # Annotations that do not resolve say nothing; their text below still may.
    with contextlib.suppress(Exception):
        annotation = typing.get_type_hints(function).get(first.name, annotation)
    name = getattr(annotation, "__name__", str(annotation)).rpartition(".")[2]
    return {"SftInputs": "sft", "PolicyInputs": "policy"}.get(name)


def _check_option(name: str, key: str, value: Any, known: Mapping[str, Any]) -> None:
    if key not in known:
        raise UserError(f"loss {name} has no option {key}{nearest(key, known)}; it has: {', '.join(known)}")
    choices = (_SFT_CHOICES if name in sft.SFT_LOSSES else _POLICY_CHOICES).get(key)
    if choices is not None:
        if value not in choices:
            raise UserError(
                f"loss {name}: {key} is {value!r}{nearest(str(value), choices)}; it is one of {', '.join(choices)}"
            )
        return
    if value is None and known[key] is None:
        return
    if value is None and key.endswith(("clamp", "threshold", "_min", "_max", "_cap", "clip", "top_entropy")):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"loss {name}: {key} is {value!r}, which is not a finite number")
    if key in ("top_entropy", "cov_fraction", "epsilon", "beta") and not 0 <= value <= 1:
        raise UserError(f"loss {name}: {key} is {value}; it is a fraction, 0 to 1")
    if key == "temperature" and value <= 0:
        raise UserError(f"loss {name}: {key} is {value}; it is greater than 0")
