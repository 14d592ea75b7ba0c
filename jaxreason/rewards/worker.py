"""Calls reward functions, and is the process that does so for ``pool``: it imports neither jax nor numpy."""

import contextlib
import math
import numbers
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Literal

from jaxreason.errors import UserError
from jaxreason.rewards import registry
from jaxreason.rewards.registry import Reward
from jaxreason.rewards.sample import Sample

Kind = Literal["raised", "timeout", "crashed", "not_finite", "wrong_type", "wrong_length"]
Outcome = tuple[Literal["reward"] | Kind, float | str | None]
"""("reward", value or None), or (kind of error, message)."""

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
        return [("raised", _describe(error))] * len(samples)
    if not reward.batch:
        return [_outcome(value)]
    if not isinstance(value, list | tuple):
        return [("wrong_type", f"returned a {type(value).__name__}, not a list of rewards")] * len(samples)
    if len(value) != len(samples):
        return [("wrong_length", f"returned {len(value)} rewards for {len(samples)} samples")] * len(samples)
    return [_outcome(item) for item in value]


def _outcome(value: object) -> Outcome:
    if value is None:
        return "reward", None
    if not isinstance(value, numbers.Real):
        return "wrong_type", f"returned a {type(value).__name__}, not a number or None"
    value = float(value)
    return ("reward", value) if math.isfinite(value) else ("not_finite", f"returned {value}")


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
            try:
                reply = call(rewards[index], samples)
            except UserError as error:
                reply = ("stop", str(error))
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(reply)
