"""Tokenizes a source once, in several processes, into a cache keyed by everything that the tokens depend on."""

import collections
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxreason.data.chunks import Chunk
from jaxreason.data.encode import Encoded, Encoder
from jaxreason.data.example import Reject
from jaxreason.data.schema import known
from jaxreason.data.sources import Source
from jaxreason.data.store import FORMAT, Store, Writer, open_store
from jaxreason.data.tally import Tally
from jaxreason.errors import UserError
from jaxreason.paths import local

_HEARTBEAT_SECONDS = 30
_PATIENCE_SECONDS = 10  # processes take seconds to start, so a small source is done sooner without them


def cache_root(cache_dir: str | None) -> Path:
    """``data.cache_dir``, else ``$JAXREASON_CACHE``, else ``~/.cache/jaxreason``."""
    return local(cache_dir or os.environ.get("JAXREASON_CACHE") or "~/.cache/jaxreason", "data.cache_dir")


def tokenize(
    source: Source,
    encoder: Encoder,
    *,
    schema: str,
    max_rows: int | None,
    workers: int,
    cache: Path,
    progress: bool,
) -> Store:
    """The source's examples as tokens, from ``cache`` where nothing changed. Raises UserError."""
    known(schema)
    path = cache / "tokens" / _key(source, encoder, schema, max_rows)
    store = open_store(path)
    if store is None:
        _build(path, source, encoder, schema, max_rows, workers, progress)
        store = open_store(path)
    if store is None:
        raise UserError(f"{path}: was written just now and is gone; make the tokens again")
    return store


def _key(source: Source, encoder: Encoder, schema: str, max_rows: int | None) -> str:
    chat = encoder.chat
    state = [FORMAT, source.fingerprint, encoder.tokenizer.fingerprint, chat.template, chat.tokens, chat.system_prompt]
    state += [chat.control, encoder.keep_only_correct, encoder.spans, schema, max_rows]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]


def _build(
    path: Path, source: Source, encoder: Encoder, schema: str, max_rows: int | None, workers: int, progress: bool
) -> None:
    writer, tally = Writer(path, encoder.tokenizer.vocab_size), Tally()
    try:
        for chunk, part in _advance(source, encode_all(source.chunks(), encoder, schema, workers), progress):
            if max_rows is not None and tally.rows + part.rows > max_rows:
                part = _first_rows(part, max_rows - tally.rows)
            for _, reason, key, detail in part.rejects:
                tally.reject(Reject(reason, detail), functools.partial(chunk.place, key))
            tally.formats.update(filter(None, part.formats))
            writer.add(part, tally.rows)
            tally.rows += part.rows
            if tally.rows == max_rows:
                break
        if not tally.rows:
            raise UserError(f"data.source {source.name}: holds no rows")
        writer.commit({"rows": tally.rows, "rejects": tally.rejects, "formats": dict(tally.formats)})
    except BaseException:
        writer.discard()
        raise


def _first_rows(part: Encoded, count: int) -> Encoded:
    keep = int(np.searchsorted(part.ordinals, count))
    return Encoded(
        part.ids[: part.lengths[:keep].sum()],
        part.lengths[:keep],
        part.starts[:keep],
        part.answers[:keep],
        part.ordinals[:keep],
        count,
        [reject for reject in part.rejects if reject.ordinal < count],
        part.formats[:count],
    )


_encoder: Encoder | None = None  # of a tokenizing process, so that the tokenizer is not sent with every chunk


def _start(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = encoder


def _end_with_parent() -> None:
    """Ends this process once the one that started it has ended, killed or not: nobody else would."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a process of a pool
    parent.join()
    os._exit(1)


def _work(chunk: Chunk, schema: str) -> Encoded:
    assert _encoder is not None  # _start has run: it is the pool's initializer
    return _encoder.chunk(chunk, schema)


def encode_all(
    chunks: Iterator[Chunk], encoder: Encoder, schema: str, workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    """Encoded chunks in order. Only a few are read ahead, so memory does not grow with the data."""
    began = time.monotonic()
    for chunk in chunks:
        yield chunk, encoder.chunk(chunk, schema)
        if workers and time.monotonic() - began > _PATIENCE_SECONDS:
            break
    else:
        return
    # Fork would copy the locks of JAX's and the tokenizer's threads in whatever state they are.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(encoder,)
    )
    waiting: collections.deque[tuple[Chunk, concurrent.futures.Future[Encoded]]] = collections.deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, chunk, schema)))
            if len(waiting) > 2 * workers:
                chunk, future = waiting.popleft()
                yield chunk, future.result()
        while waiting:
            chunk, future = waiting.popleft()
            yield chunk, future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a tokenizing process died, most likely out of memory, near {chunk.place(0)}; set data.workers=0 or fewer"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _advance(source: Source, parts: Iterator[tuple[Chunk, Encoded]], progress: bool) -> Iterator[tuple[Chunk, Encoded]]:
    """The parts, with a progress bar on a terminal and a line now and then in a log."""
    console, done, rows, told, total = Console(stderr=True), 0, 0, time.monotonic(), source.weigh()
    columns = (TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]:,} rows"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not (progress and console.is_terminal))
    with bar:
        task = bar.add_task("", total=total or None, rows=0)
        for chunk, part in parts:
            done, rows = done + chunk.weight, rows + part.rows
            bar.update(task, completed=done, rows=rows)
            if progress and not console.is_terminal and time.monotonic() - told > _HEARTBEAT_SECONDS:
                console.print(f"tokenizing {source.name}: {f'{done / total:.0%}, ' if total else ''}{rows:,} rows")
                told = time.monotonic()
            yield chunk, part
