"""Renders chat templates that somebody else wrote, in a process with bounds of time, memory and output.

A template is a program: it can loop for years, or double a text until the machine's memory is full, in a sandbox too. This
module imports nothing but jinja2, and is what that process runs.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import connection as mp_connection
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxreason.processes import Process

START_LIMIT_S, LIMIT_S = 60.0, 10.0
MAX_CHARS = 64 << 20
_MEMORY_BYTES = 2 << 30

# Llama-3.2's template writes today's date into the system message: the same row must give the same tokens on any day.
DATE = datetime.datetime(2024, 7, 26)


class TemplateFailed(ValueError):
    """The template could not be rendered: why, in one line."""


class TemplateKilled(TemplateFailed):
    """Its process was killed, or died: another text would fare no better, and each would cost the limit."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for other trainers; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def here(template: str, values: Mapping[str, Any]) -> str:
    """The rendered text, in this process and without bounds. Raises TemplateFailed, whatever the template raises."""
    try:
        text = _compile(template).render(**values)
    except Exception as error:  # a template may raise anything: RecursionError, MemoryError, ZeroDivisionError …
        raise TemplateFailed(f"{type(error).__name__}: {error}"[:300]) from None
    if len(text) > MAX_CHARS:
        raise TemplateFailed(f"it writes {len(text)} characters; at most {MAX_CHARS} are taken")
    return text


def apart(template: str, values: Mapping[str, Any]) -> str:
    """The same in a process that is killed after ``LIMIT_S`` seconds. Raises TemplateFailed."""
    global _process
    with _guard:
        if _process is None or _process.owner != os.getpid():
            _process = _Process()
        try:
            return _process.render(template, dict(values))
        except TemplateFailed:
            raise
        except BaseException as error:  # an interrupt too: the answer that still comes is not that of the next question
            _process.close()
            _process = None
            if isinstance(error, _Lost):
                raise TemplateKilled(str(error)) from None
            raise


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compiled as transformers does it, sandboxed, but with the clock pinned."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    return environment.from_string(template)


class _Lost(Exception):
    """The process is of no more use."""


class _Process:
    """A process that renders, and this end of the line to it."""

    def __init__(self):
        self.owner = os.getpid()  # a fork of this process must not share the line
        self._process = Process("jaxreason.data.render", {})
        self._connection = self._process.connection
        self._receive(START_LIMIT_S)

    def render(self, template: str, values: dict[str, Any]) -> str:
        try:
            self._connection.send((template, values))
        except OSError:
            raise _Lost("its process ended") from None
        state, text = self._receive(LIMIT_S)
        if state == "failed":
            raise TemplateFailed(text)
        return text

    def _receive(self, limit_s: float) -> tuple[str, str]:
        until = time.monotonic() + limit_s
        try:
            while not self._connection.poll(max(0.0, until - time.monotonic())):
                if time.monotonic() >= until:
                    raise _Lost(f"it takes more than {limit_s:.0f} s")
            return self._connection.recv()
        except (EOFError, OSError):
            raise _Lost("its process ended, for want of memory or by a crash") from None

    def close(self) -> None:
        if self.owner == os.getpid():
            self._process.kill()
        else:
            self._connection.close()


_process: _Process | None = None
_guard = threading.Lock()


@atexit.register
def _end() -> None:
    if _process is not None:
        _process.close()


def main(descriptor: int) -> None:
    """Serves the other end of the socket ``descriptor`` until that closes."""
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), mp_connection.Connection(descriptor) as line:
        line.send(("ready", ""))
        while True:
            template, values = line.recv()
            # The other end kills at the limit; this is for one that was itself killed.
            signal.setitimer(signal.ITIMER_REAL, 2 * LIMIT_S)
            try:
                reply = ("text", here(template, values))
            except TemplateFailed as failed:
                reply = ("failed", str(failed))
            signal.setitimer(signal.ITIMER_REAL, 0)
            line.send(reply)
