"""Losses by name: the built-in ones, and yours by import path."""

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jax import Array

from jaxreason import plugins
from jaxreason.errors import UserError
from jaxreason.losses import distill, presets, sampler_correction, sft, variants
from jaxreason.losses.axes import Axes
from jaxreason.losses.check import reads_of
from jaxreason.losses.inputs import OPTIONAL_INPUTS, Inputs, PolicyInputs, SftInputs, check_shapes, need_extra, only
from jaxreason.losses.policy import policy_loss, shared_metrics
from jaxreason.losses.reads import unnoted
from jaxreason.losses.reduce import whole_step
from jaxreason.plugins import nearest

Kind = Literal["sft", "policy"]


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
    needs: frozenset[str]  # optional inputs and extras that it reads
    function: Callable[..., tuple[Array, dict[str, Array]]] = field(repr=False)
    advantage: str | None = None  # the estimator (``jaxreason.losses.advantage``) that belongs to it; sft: None
    advantage_preset: str | None = None
    kl_placement: str = "loss"  # where its KL belongs: ``loss`` or ``reward``
    select: Callable[..., Array] | None = field(default=None, repr=False)
    # select(inputs of the whole step, logp = old_logp, key) -> [B, T] for ``PolicyInputs.selected``
    reselects: bool = False  # ``select`` is of the current policy: it runs before every update, with logp its own
    divergence: distill.Divergence | None = field(default=None, repr=False)
    # divergence(student's logits [..., V], teacher's) -> [...] for ``inputs.teacher_divergence``

    @property
    def extras(self) -> frozenset[str]:
        """The names that it reads ``inputs.extras`` by."""
        return self.needs - frozenset(OPTIONAL_INPUTS[self.kind])

    @property
    def note(self) -> str | None:
        """What whoever compares it with grpo at one learning rate has to know; None: nothing."""
        if self.options.get("ratio") == "sequence_sum" or self.options.get("reduce") in ("seq-mean-token-sum", "token-sum"):
            return (
                f"{self.name} adds a completion's tokens up where grpo averages them: its gradient is about as many times grpo's "
                "as completions have tokens; choose optimizer.learning_rate and optimizer.max_grad_norm for it"
            )
        return None

    def __call__(self, inputs: Inputs) -> tuple[Array, dict[str, Array]]:
        """Value and metrics. Raises UserError for inputs of the other kind, or arrays that are not [B, T] of one shape."""
        expected = SftInputs if self.kind == "sft" else PolicyInputs
        if not isinstance(inputs, expected):
            raise UserError(
                f"loss {self.name} is a {self.kind} loss: it takes {expected.__name__}, not {type(inputs).__name__}"
            )
        inputs = unnoted(inputs, self.needs)
        check_shapes(inputs)
        return self.function(inputs, **self.options)


def loss(
    *, kind: Kind, tokenwise: bool = False, needs: Iterable[str] | None = None, advantage: str | None = None
) -> Callable[[Callable], Callable]:
    """Declares a function of your own as a loss; see ``get`` for what an undeclared one is taken for.

    Args:
      kind, tokenwise: as in ``Loss``.
      needs: the optional inputs it reads, the others being None, and the names that it reads ``inputs.extras`` by, the
        others not being there; None: found by tracing it.
      advantage: the estimator that belongs to it; None: grpo, if it is a policy loss.
    """

    def declare(function: Callable) -> Callable:
        return plugins.mark(function, kind=kind, tokenwise=tokenwise, needs=needs, advantage=advantage)

    return declare


def names(kind: Kind | None = None) -> list[str]:
    """The built-in losses."""
    policy = [] if kind == "sft" else list(variants.VARIANTS)
    return ([] if kind == "policy" else list(sft.SFT_LOSSES)) + policy


def defaults(name: str) -> dict[str, Any]:
    """Every option of a built-in loss with its default."""
    return {key: parameter.default for key, parameter in _declared(name).items()}


def _declared(name: str) -> variants.Options:
    if name in variants.VARIANTS:
        return variants.VARIANTS[name].declared()
    per_token, changed, _ = sft.SFT_LOSSES[name]
    apart = distill.declared(name) if name in distill.DIVERGENCES else {}
    return variants.options_of(sft.sft_loss, per_token, changed=changed) | apart


def get(name: str, /, *, kind: Kind | None = None, preset: str | None = None, **options: Any) -> Loss:
    """The loss ``name`` with ``options``.

    Args:
      name: a built-in (``names()``), ``package.module:function`` or ``path/to/file.py:function``. A function of your
        own takes (inputs, **options) and returns (scalar, metrics). It may be declared with ``@losses.loss(...)``;
        otherwise its kind follows the annotation of its first parameter (without one: ``kind``, or policy), it is not
        tokenwise, and it is given every optional input that it reads.
      kind: the kind that the caller trains with; None: any.
      preset: a framework's name (``losses.presets``): its conventions and defaults (``docs/losses.md``); ``options`` win over
        it, and a loss that it has not is refused.

    Raises:
      UserError: unknown name, option, preset or choice, with the nearest valid one; a loss of the other kind.
    """
    found = _find(name, kind, preset, options)
    if kind is not None and found.kind != kind:
        raise UserError(f"loss {name} is a {found.kind} loss, but a {kind} loss is wanted: {', '.join(names(kind))}")
    return found


def divergence(name: str, /, **options: Any) -> distill.Divergence:
    """The divergence ``name`` (``losses.distill.DIVERGENCES``) with ``options``, of a student's and a teacher's logits.

    Raises UserError for an unknown name or option, with the nearest valid one.
    """
    if name not in distill.DIVERGENCES:
        known = ", ".join(distill.DIVERGENCES)
        raise UserError(f"teacher.divergence {name!r} is unknown{nearest(name, distill.DIVERGENCES)}; there are: {known}")
    return distill.bound(name, **plugins.check_values(options, distill.declared(name), "teacher.options", name))


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
    options = plugins.check_values(options, _declared(name), "loss.options", name)
    known = defaults(name)
    if name in sft.SFT_LOSSES:
        if preset is not None:
            raise UserError(f"loss.preset {preset} applies to policy losses; {name} is a supervised loss")
        return _sft(name, known | options)
    conventions = {} if preset is None else presets.changes(preset, name, known, options)
    return _policy(name, known | conventions | options, preset)


def _sft(name: str, options: dict[str, Any]) -> Loss:
    per_token, _, needs = sft.SFT_LOSSES[name]
    apart = {key: options[key] for key in distill.declared(name)} if name in distill.DIVERGENCES else {}

    def function(inputs: SftInputs, **bound: Any) -> tuple[Array, dict[str, Array]]:
        return sft.sft_loss(inputs, per_token=per_token, **{k: v for k, v in bound.items() if k not in apart})

    return Loss(
        name=name,
        options=options,
        kind="sft",
        tokenwise=options["reduce"] == "token-mean" and options.get("level") != "sequence",
        needs=needs | ({"logsumexp"} if options["z_loss_coef"] else frozenset()),
        function=function,
        divergence=distill.bound(name, **apart) if name in distill.DIVERGENCES else None,
    )


def _policy(name: str, options: dict[str, Any], preset: str | None) -> Loss:
    variant, framework = variants.VARIANTS[name], None if preset is None else presets.find(preset)
    sampler_correction.check_bounds(options)
    for key in ("reduce", "kl_reduce", "entropy_reduce", "distill_reduce"):
        if options[key] == "token-sum/const" and options["max_completion_tokens"] is None:
            raise UserError(f"loss {name}: {key} token-sum/const divides by a constant; set loss.options.max_completion_tokens")
    if name == "vespo" and options["ratio"] != "token":
        raise UserError("loss vespo forms the sequence ratio itself; leave its option ratio at token")
    if name == "vespo" and options["correction"] not in ("none", "tis", "icepop"):
        raise UserError(
            f"loss vespo takes the correction into its sequence ratio, token by token: correction is "
            f"{options['correction']}; use tis or icepop"
        )
    if name == "real" and options["ratio"] != "sequence_mean":
        raise UserError("loss real is of a completion's mean log-ratio; leave its option ratio at sequence_mean")
    if name == "chord" and options["reduce"] != "token-mean":
        raise UserError("loss chord is two means over tokens of their own; leave its option reduce at token-mean")
    if name == "chord" and (options["mu_valley"] is None) != (options["mu_decay_steps"] == 0):
        raise UserError("loss chord lets mu fall to mu_valley over mu_decay_steps; give both or neither")
    rule = variants.step_rule(variant, options)
    needs = {
        "ref_logp": options["kl_coef"] != 0,
        "sampler_logp": options["correction"] != "none"
        or options["reject"] != "none"
        or options["behaviour"] == "sampler"
        or (options["kl_coef"] != 0 and options["kl_ratio"] == "sampler")
        or (options["off_policy_threshold"] is not None and options["off_policy_behaviour"] == "sampler"),
        "entropy": options["entropy_coef"] != 0 or options["top_entropy"] is not None,
        "group_tokens": "prompt-mean" in (options[f"{axis}reduce"] for axis in ("", "kl_", "entropy_", "distill_")),
        "selected": rule is not None,
        "teacher_divergence": options["distill_coef"] != 0,
        "positive": options["positive_nll_coef"] != 0,
        "step": any(options.get(f"mu_{phase}_steps") for phase in ("warmup", "decay")),
    }
    read = variant.extras | {key for key, needed in needs.items() if needed}

    def function(inputs: PolicyInputs, **bound: Any) -> tuple[Array, dict[str, Array]]:
        for extra in sorted(read & (variant.extras | {"step"})):
            need_extra(inputs, extra, f"loss {name}")
        return policy_loss(inputs, Axes.of(bound), variant.bound(bound), rule)

    return Loss(
        name=name,
        options=options,
        kind="policy",
        tokenwise=False,
        needs=read,
        function=function,
        advantage=variant.advantage if framework is None else framework.advantage.get(name, variant.advantage),
        advantage_preset=preset,
        kl_placement=variant.kl_placement if framework is None else framework.kl_placement or variant.kl_placement,
        select=None if rule is None else variants.on_raw(rule),
        reselects=variant.reselects,
    )


def _custom(name: str, wanted: Kind | None, options: dict[str, Any]) -> Loss:
    function = plugins.load(name, "loss.name")
    bound = plugins.check_options(function, options, "loss.options")
    kind = getattr(function, "kind", None) or _annotated_kind(function) or wanted or "policy"
    if kind not in OPTIONAL_INPUTS:
        raise UserError(f"loss {name}: kind is {kind!r}; it is sft or policy")
    declared = getattr(function, "needs", None)
    needs = reads_of(name, function, bound, kind) if declared is None else _declared_needs(name, declared, kind)

    def whole(inputs: Inputs, **given: Any) -> tuple[Array, dict[str, Array]]:
        inputs = whole_step(inputs)
        found = function(only(inputs, needs), **given)
        # In addition to a policy loss's own metrics there are those of every policy, so that losses compare; its own win.
        return (found[0], shared_metrics(inputs) | found[1]) if isinstance(inputs, PolicyInputs) and _is_pair(found) else found

    return Loss(
        name=name,
        options=bound,
        kind=kind,
        tokenwise=bool(getattr(function, "tokenwise", False)),
        needs=needs,
        function=whole,
        advantage=getattr(function, "advantage", None) or ("grpo" if kind == "policy" else None),
    )


def _declared_needs(name: str, declared: Iterable[str], kind: Kind) -> frozenset[str]:
    fields = set(SftInputs.__dataclass_fields__ if kind == "sft" else PolicyInputs.__dataclass_fields__)
    if isinstance(declared, str):
        raise UserError(f"loss {name}: needs is the text {declared!r}; write needs=({declared!r},)")
    for need in declared:
        if need in fields - set(OPTIONAL_INPUTS[kind]):
            raise UserError(f"loss {name} needs {need}, which every {kind} loss is given if there is one; leave it out of needs")
    return frozenset(declared)


def check_filled(loss: Loss, fills: Mapping[str, str]) -> None:
    """Whether something fills every extra that ``loss`` reads; ``fills``: its name -> who fills it, in words.

    Raises UserError with the extra that nothing fills, what is filled and by whom, and the nearest name there is.
    """
    for name in sorted(loss.extras - set(fills)):
        known = ", ".join(f"{extra} by {who}" for extra, who in fills.items()) or "none"
        near = nearest(name, [*OPTIONAL_INPUTS[loss.kind], *fills])
        raise UserError(
            f"loss {loss.name} reads {name}, which is no input of a {loss.kind} loss and no extra that anything fills{near}; "
            f"extras filled: {known}. A reward or an advantage estimator fills it that declares fills=({name!r},)"
        )


def _is_pair(found: Any) -> bool:
    """Whether a loss returned (value, metrics); ``check`` says what is wrong with anything else."""
    return isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)


def _annotated_kind(function: Callable) -> Kind | None:
    first = next(iter(inspect.signature(function).parameters.values()))
    annotation = first.annotation
    # Annotations that do not resolve say nothing; their text below still may.
    with contextlib.suppress(Exception):
        annotation = typing.get_type_hints(function).get(first.name, annotation)
    name = getattr(annotation, "__name__", str(annotation)).rpartition(".")[2]
    kinds: dict[str, Kind] = {"SftInputs": "sft", "PolicyInputs": "policy"}
    return kinds.get(name)
