"""The start-up check of a loss: a tiny batch through every rule that training relies on, in about a second."""

import dataclasses
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreason.errors import UserError
from jaxreason.losses.inputs import FIXED, Inputs, PolicyInputs, SftInputs, only
from jaxreason.losses.reads import reads
from jaxreason.losses.reduce import whole_step
from jaxreason.plugins import nearest

_PADDING = 2  # columns that a row may have more: of 8, which makes it as long as a quarter of all tokens, and one program of two
_ROWS = "microbatches of one row"
_PADDED_ROWS = f"microbatches of one row with {_PADDING} more columns of padding"
_OF_TRACING = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
_DIFFERENTIABLE = ("logp", "entropy", "logsumexp", "mean_logp", "ref_kl", "teacher_divergence")
_POISONS = (1e30, -1e30, float("nan"))
_RESERVED = {"step", "loss", "grad_norm", "leaf_norms", "learning_rate", "tokens", "reward", "seconds"}  # a step's own
_TOLERANCE = 1e-5  # of the largest number compared: float32 sums of a few dozen terms in another order
_FAR = 20.0  # nats: a log-ratio that a run gone astray meets; e^20 squared is still a float32


def check(loss: Any) -> None:
    """Runs ``loss`` (a ``Loss``) on a tiny batch of unequal, packed sequences, one row of which is all padding.

    Held: a scalar float loss and scalar metrics; finite value and gradient, also of a policy that moved by 20 nats a token, and
    some gradient; masked positions inert (filled with 1e30, -1e30, NaN); the same value, metrics and gradient when the rows come
    in microbatches with the step's totals and in rows with more padding; for ``tokenwise`` losses also in any chunks of tokens.

    Raises:
      UserError: which rule the loss breaks, with the numbers and the usual fix.
    """
    inputs = _on_host(jax.jit(_filled, static_argnums=0)(loss.select, tiny_inputs(loss.kind, sorted(loss.extras))))
    inputs = only(inputs, loss.needs)
    evaluate = _evaluator(loss)
    value, metrics, grads = evaluate(inputs)
    _check_finite(loss.name, value, metrics, grads, "on a tiny batch of ordinary numbers")
    if all(not np.any(grad) for grad in grads.values()):
        raise UserError(f"loss {loss.name} has no gradient: it reads none of {', '.join(grads)} outside stop_gradient")
    if isinstance(inputs, PolicyInputs):
        far = f"where the log-probs are {_FAR:g} nats from the old ones: clip the log-ratio before its exp or its power"
        _check_finite(loss.name, *evaluate(only(_moved(inputs), loss.needs)), far)
    _check_poison(loss.name, evaluate, inputs, value, metrics, grads)
    rows = [_slice(inputs, np.s_[r : r + 1]) for r in range(inputs.mask.shape[0])]
    # Both at once, which is one program less to compile; what a loss breaks is told apart when it breaks one.
    padded_grads = {key: np.pad(grad, ((0, 0), (0, _PADDING))) for key, grad in grads.items()}
    try:
        _check_parts(loss.name, evaluate, [_padded(x) for x in rows], value, metrics, padded_grads, _PADDED_ROWS, axis=0)
    except UserError:
        _check_parts(loss.name, evaluate, rows, value, metrics, grads, _ROWS, axis=0)
        raise
    if loss.tokenwise:
        flat = jax.tree.map(lambda x: x.reshape(1, -1) if np.ndim(x) else x, inputs)
        size = flat.mask.shape[1] // 4
        chunks = [_slice(flat, np.s_[:, k * size : (k + 1) * size]) for k in range(4)]
        flat_grads = {key: grad.reshape(1, -1) for key, grad in grads.items()}
        what = "chunks of tokens, as a tokenwise loss must allow (declare tokenwise=False otherwise)"
        _check_parts(loss.name, evaluate, chunks, value, metrics, flat_grads, what, axis=1)


def _filled(select: Callable[[Inputs], Array] | None, inputs: Inputs) -> Inputs:
    """The inputs with all that a caller computes over the whole step."""
    inputs = whole_step(inputs)
    return dataclasses.replace(inputs, selected=select(inputs)) if select and isinstance(inputs, PolicyInputs) else inputs


def _on_host(tree: Any) -> Any:
    """The tree as numpy arrays: on jax's, each little step of this check is a program to compile."""
    return jax.tree.map(np.asarray, tree)


def tiny_inputs(kind: str, extras: Iterable[str] = ()) -> Inputs:
    """Five rows of eight tokens, every optional input and the ``extras`` present: unequal lengths, two packed rows, one of
    padding only. An extra is drawn from a normal distribution; as an entropy it is positive."""
    rng = np.random.default_rng(0)
    mask: Any = np.array(
        [[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 0, 0],
         [0, 0, 0, 0, 0, 0, 0, 0]], np.float32
    )  # fmt: skip
    ids: Any = np.array([[0] * 8, [1] * 4 + [2] * 4, [3] * 8, [4] * 4 + [5] * 4, [6] * 8], np.int32)

    def normal(scale: float = 1.0) -> Any:  # numpy's arrays stand for jax's here
        return rng.normal(scale=scale, size=mask.shape).astype(np.float32)

    def more() -> dict[str, Any]:
        return {name: np.abs(normal()) if "entropy" in name else normal() for name in extras}

    logp = -np.abs(normal()) - np.float32(0.05)
    entropy, sequence_ids = np.abs(normal()) + np.float32(0.1), ids
    if kind == "sft":
        return SftInputs(
            logp=logp,
            mask=mask,
            sequence_ids=sequence_ids,
            entropy=entropy,
            logsumexp=normal(),
            mean_logp=-np.abs(normal()) - 3.0,
            ref_logp=logp + normal(0.3),
            ref_kl=np.abs(normal(0.1)),
            teacher_divergence=np.abs(normal(0.1)),
            topk_entropy=np.abs(normal()),
            token_weights=np.abs(normal()),
            extras=more(),
        )
    old_logp = logp + normal(0.3)
    return PolicyInputs(
        logp=logp,
        mask=mask,
        sequence_ids=sequence_ids,
        entropy=entropy,
        old_logp=old_logp,
        advantages=normal(),
        ref_logp=old_logp + normal(0.3),
        sampler_logp=old_logp + normal(0.05),
        group_ids=ids // 2,
        extras=more(),
        teacher_divergence=np.abs(normal(0.1)),
    )


def reads_of(name: str, function: Callable, options: Mapping[str, Any], kind: str) -> frozenset[str]:
    """The optional inputs and extras that a function of one's own touches. Raises UserError if it fails when traced."""
    try:
        return reads(function, whole_step(tiny_inputs(kind)), options)
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _evaluator(loss: Any) -> Callable[[Inputs], tuple[Any, dict, dict]]:
    """inputs -> (value, metrics, gradient of the value by input)."""

    def value_and_metrics(parts: dict[str, Any], inputs: Inputs) -> tuple[Array, dict]:
        result = loss(dataclasses.replace(inputs, **parts))
        _check_result(loss.name, result)
        return result

    differentiate = jax.jit(jax.value_and_grad(value_and_metrics, has_aux=True))

    def evaluate(inputs: Inputs) -> tuple[Any, dict, dict]:
        parts = {key: value for key in _DIFFERENTIABLE if (value := getattr(inputs, key, None)) is not None}
        try:
            (value, metrics), grads = _on_host(differentiate(parts, inputs))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(loss.name, error) from error
        return value, metrics, grads

    return evaluate


def _failed(name: str, error: BaseException) -> UserError:
    file = name.rpartition(":")[0].replace(".", "/").removesuffix("/py")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.removesuffix(".py").endswith(file)]
    place = f" at {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    first_line = str(error).strip().partition("\n")[0]
    hint = ""
    if "NoneType" in first_line:
        hint = " (optional inputs outside its `needs` are None)"
    elif isinstance(error, AttributeError) and isinstance(error.obj, PolicyInputs | SftInputs):
        fields = [f.name for f in dataclasses.fields(error.obj)]
        hint = f"{nearest(error.name or '', fields)}; it has {', '.join(fields)}"
    elif isinstance(error, KeyError):
        hint = " (extras outside its `needs` are not in inputs.extras)"
    elif isinstance(error, _OF_TRACING):
        hint = " (the function is compiled: write it in jax.numpy, without numpy, float() or `if` on values)"
    return UserError(f"loss {name} failed on a tiny batch{place}: {type(error).__name__}: {first_line}{hint}")


def _check_result(name: str, result: Any) -> None:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        parts = result if isinstance(result, tuple) else (result,)
        found = ", ".join("array" if isinstance(x, Array) else type(x).__name__ for x in parts)
        found = f"({found})" if isinstance(result, tuple) else found
        raise UserError(f"loss {name} must return (value, metrics) with metrics a dict, but returned {found}")
    value, metrics = result
    for key in metrics:
        if not isinstance(key, str):
            raise UserError(f"loss {name}: a metric is called {key!r}; its name is a string")
        if key in _RESERVED:
            raise UserError(f"loss {name}: a metric is called {key!r}, as one of every step is; give it another name")
    for what, x in {"its value": value, **{f"metric {key!r}": x for key, x in metrics.items()}}.items():
        if not isinstance(x, Array | np.ndarray | np.generic | int | float):
            raise UserError(f"loss {name}: {what} is a {type(x).__name__}; a scalar array is expected")
        if jnp.shape(x) != ():
            raise UserError(
                f"loss {name}: {what} has shape {jnp.shape(x)}; a scalar is expected: sum over tokens, then divide once"
            )
    if jnp.result_type(value) != jnp.float32:
        raise UserError(f"loss {name}: its value has dtype {jnp.result_type(value)}; float32 is expected")


def _check_finite(name: str, value: Array, metrics: dict, grads: dict, where: str) -> None:
    for what, x in {"its value": value, **{f"metric {key!r}": x for key, x in metrics.items()}}.items():
        if not np.isfinite(x):
            raise UserError(f"loss {name}: {what} is {x} {where}")
    for key, grad in grads.items():
        if bad := np.argwhere(~np.isfinite(grad)).tolist():
            row, token = bad[0]
            raise UserError(
                f"loss {name}: the gradient by inputs.{key} is {grad[row, token]} at row {row}, token {token}, {where}"
            )


def _moved(inputs: PolicyInputs) -> PolicyInputs:
    """Every second token became sure, the others all but impossible."""
    sure = np.broadcast_to(np.arange(inputs.mask.shape[1]) % 2 == 0, inputs.mask.shape)
    near, far = np.float32(-0.05), np.float32(-0.05 - _FAR)
    before: Any = np.where(sure, far, near)
    now: Any = np.where(sure, near, far)
    return dataclasses.replace(inputs, logp=now, old_logp=before, ref_logp=before, sampler_logp=before)


def _check_poison(name: str, evaluate: Callable, inputs: Inputs, value: Array, metrics: dict, grads: dict) -> None:
    dead = inputs.mask <= 0
    fields = [f.name for f in dataclasses.fields(inputs) if f.name not in FIXED and getattr(inputs, f.name) is not None]
    fix = "; begin with `inputs, sequences = losses.clean(inputs)`, which puts 0 at masked positions before any exp"
    for poison in _POISONS:
        values = {key: getattr(inputs, key) for key in fields}
        filled = jax.tree.map(lambda x, poison=poison: np.where(dead, np.asarray(poison, x.dtype), x), values)
        poisoned, poisoned_metrics, poisoned_grads = evaluate(dataclasses.replace(inputs, **filled))
        size = _size(value, *grads.values())
        if not _close(value, poisoned, size):
            raise UserError(
                f"loss {name}: {poison} at masked positions changes the value from {value} to {poisoned}{fix}"
            )
        for key, metric in metrics.items():
            if not _close(metric, poisoned_metrics[key], _size(metric)):
                raise UserError(f"loss {name}: {poison} at masked positions changes metric {key!r}{fix}")
        for key, grad in grads.items():
            if not _close(grad, poisoned_grads[key], size):
                raise UserError(f"loss {name}: {poison} at masked positions changes the gradient by inputs.{key}{fix}")
    for key, grad in grads.items():
        if np.any(np.asarray(grad)[np.asarray(dead)]):
            raise UserError(f"loss {name}: inputs.{key} gets a gradient at masked positions{fix}")


def _check_parts(
    name: str, evaluate: Callable, parts: list[Inputs], value: Array, metrics: dict, grads: dict, what: str, axis: int
) -> None:
    results = [evaluate(part) for part in parts]
    fix = "; sum over tokens and divide by inputs.totals (counts of the whole step), never by the batch's own size or width"
    total = sum(part[0] for part in results)
    size = _size(value, *(part[0] for part in results), *grads.values())
    if not _close(value, total, size):
        on = "the padding of its rows" if what == _PADDED_ROWS else "how the batch is split"
        raise UserError(f"loss {name} depends on {on}: {value} whole, {total} as the sum over {what}{fix}")
    for key, whole in metrics.items():
        values = np.stack([part[1][key] for part in results])
        combined = values.max() if key.endswith("_max") else values.min() if key.endswith("_min") else values.sum()
        if not _close(whole, combined, _size(whole, values)):
            raise UserError(f"loss {name}: metric {key!r} is {whole} whole but {combined} over {what}{fix}")
    for key, grad in grads.items():
        if not _close(grad, np.concatenate([part[2][key] for part in results], axis=axis), size):
            raise UserError(f"loss {name}: the gradient by inputs.{key} depends on the split, over {what}{fix}")


def _padded(inputs: Inputs) -> Inputs:
    """Rows with more masked positions at their end, which belong to the last sequence and hold what the last position holds."""
    wide = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, _PADDING)), mode="edge") if np.ndim(x) else x, inputs)
    return dataclasses.replace(wide, mask=np.pad(inputs.mask, ((0, 0), (0, _PADDING))))


def _slice(inputs: Inputs, index: Any) -> Inputs:
    return jax.tree.map(lambda x: x[index] if np.ndim(x) else x, inputs)


def _size(*arrays: Array | np.ndarray) -> float:
    """The largest finite magnitude: what rounding is measured by, so that a loss in small units is held as strictly as any."""
    return max(float(np.max(np.abs(np.where(np.isfinite(x), x, 0.0)), initial=0.0)) for x in arrays)


def _close(a: Array | np.ndarray, b: Array | np.ndarray, size: float) -> bool:
    return bool(np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * size))
