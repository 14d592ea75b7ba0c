"""Calls reward functions, and is the process that does so for ``pool``: it imports neither jax nor numpy."""

import array
import contextlib
import math
import numbers
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

from jaxreason.errors import UserError
from jaxreason.plugins import nearest
from jaxreason.rewards import registry
from jaxreason.rewards.registry import Reward
from jaxreason.rewards.sample import Sample, Scored

Kind = Literal["raised", "timeout", "crashed", "not_finite", "wrong_type", "wrong_length", "wrong_extras"]


class Outcome(NamedTuple):
    """What came of one sample: its reward or None, with its extras; or a kind of error with a message."""

    kind: Literal["reward"] | Kind
    value: float | str | None
    extras: dict[str, array.array] = {}  # noqa: RUF012  (name -> [n] float32)


MAX_MESSAGE_CHARS = 500


def call(reward: Reward, samples: Sequence[Sample]) -> list[Outcome]:
    """One outcome per sample; ``samples`` is a single one unless the reward takes batches.

    Whatever the function raises or returns becomes an outcome, except UserError, which is raised: a configuration that
    cannot work is no sample's fault.
    """
    try:
        value = reward.function(list(samples) if reward.batch else samples[0], **reward.options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        return [Outcome("raised", _describe(error))] * len(samples)
    if not reward.batch:
        return [_outcome(value, samples[0], reward.fills)]
    if not isinstance(value, list | tuple):
        return [Outcome("wrong_type", f"returned a {type(value).__name__}, not a list of rewards")] * len(samples)
    if len(value) != len(samples):
        return [Outcome("wrong_length", f"returned {len(value)} rewards for {len(samples)} samples")] * len(samples)
    return [_outcome(item, sample, reward.fills) for item, sample in zip(value, samples)]


def _outcome(result: object, sample: Sample, fills: frozenset[str]) -> Outcome:
    value, given = (result.value, result.extras) if isinstance(result, Scored) else (result, None)
    if value is not None:
        if not isinstance(value, numbers.Real):
            return Outcome("wrong_type", f"returned a {type(value).__name__}, not a number, None or Scored")
        value = float(value)
        if not math.isfinite(value):
            return Outcome("not_finite", f"returned {value}")
    if given is None:
        if fills and value is not None:
            return Outcome("wrong_extras", f"declares fills={sorted(fills)} but returned a number without extras; use Scored")
        # No reward, and nothing by token either.
        given = {name: [0.0] * len(sample.tokens) for name in fills}
    try:
        return Outcome("reward", value, _checked(given, len(sample.tokens), fills))
    except _WrongExtras as error:
        return Outcome("wrong_extras", str(error))


class _WrongExtras(ValueError):
    pass


def _checked(given: Mapping[str, Sequence[float]], tokens: int, fills: frozenset[str]) -> dict[str, array.array]:
    """The extras as float32 arrays, whatever sequences they were. Raises _WrongExtras."""
    if not isinstance(given, Mapping):
        raise _WrongExtras(f"extras is a {type(given).__name__}, not a dict of sequences")
    for name in given:
        if name not in fills:
            raise _WrongExtras(f"filled extras[{name!r}], which it does not declare in fills{nearest(str(name), fills)}")
    found = {}
    for name in sorted(fills):
        if name not in given:
            raise _WrongExtras(f"declares that it fills {name} and returned no extras[{name!r}]")
        try:
            values = array.array("f", map(float, given[name]))
        except (TypeError, ValueError, OverflowError) as error:
            raise _WrongExtras(f"extras[{name!r}] is no sequence of numbers: {error}") from None
        if len(values) != tokens:
            raise _WrongExtras(f"extras[{name!r}] holds {len(values)} numbers for {tokens} tokens")
        if bad := [i for i, x in enumerate(values) if not math.isfinite(x)]:
            raise _WrongExtras(f"extras[{name!r}] is {values[bad[0]]} at token {bad[0]}")
        found[name] = values
    return found


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS] + place


def main(descriptor: int) -> None:
    """Serves the pool at the other end of the socket ``descriptor`` until that end closes.

    Receives ``(targets, timeout_s, memory_gib)`` once and answers ``("ready", "")`` or ``("failed", message)``; then
    receives lists of ``(index of the function, samples)`` and answers each entry, in order, with its outcomes, or with
    ``("stop", message)`` for a UserError.
    """
    os.set_inheritable(descriptor, False)  # a grader's own child must not keep the pool's connection open
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the run's standard output is not the graders'
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(connection)


def _serve(connection: Connection) -> None:
    targets, timeout_s, memory_gib = connection.recv()
    if memory_gib is not None and sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        rewards = [registry.load(target, options) for target, options in targets]
    except Exception as error:
        connection.send(("failed", _describe(error)))
        return
    connection.send(("ready", ""))
    while True:
        for index, samples in connection.recv():
            # The pool kills at timeout_s. This is for a pool that was itself killed: SIGALRM's default action ends the
            # process even inside a C call, so that no orphan computes for ever.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
            reply: list[Outcome] | tuple[str, str]
            try:
                reply = call(rewards[index], samples)
            except UserError as error:
                reply = ("stop", str(error))
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(reply)
