"""What ``data.source`` names: files, a hub data set, or a program that writes examples."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxreason.data import files, hub
from jaxreason.data.example import Example
from jaxreason.errors import UserError
from jaxreason.paths import expanded


@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    total: int  # sum of the chunks' weights
    chunks: Callable[[], Iterator[files.Chunk]]
    fingerprint: str  # changes with the rows; for files by path, size and times, so it may also change without them


HELD_OUT = ("test", "validation", "eval")  # splits to evaluate on, the first of them that a source has


def splits_itself(source: str) -> bool:
    """Whether the source is a program that keeps its splits ``train`` and ``eval`` apart."""
    return source.startswith(("embedded:", "reasoning-gym:"))


def held_out_split(source: str) -> str | None:
    """The split of ``source`` to evaluate on where none is named; None: a file, or files that no split is named for.

    Raises UserError, with the splits that there are, where none of them is meant for evaluation. A hub id asks the hub.
    """
    if splits_itself(source):
        return "eval"
    path = expanded(source, "data.source")
    names = _hub_splits(source) if not path.exists() and _may_be_hub(source) else files.splits(path)
    if not names:
        return None
    if not (found := [name for name in HELD_OUT if name in names]):
        raise UserError(
            f"data.eval_source {source}: its splits are {', '.join(names)}, and none of them is called "
            f"{', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]}; name the one to evaluate on in data.eval_split"
        )
    return found[0]


def parts(source: str, split: str | None) -> frozenset[str]:
    """What the rows of a split are read from: two splits that share a part share rows."""
    if (path := expanded(source, "data.source")).exists() and not splits_itself(source):
        return frozenset(str(file.resolve()) for file in files.find(source, path, split))
    return frozenset([f"{source.partition('?')[0]}, split {split}"])


def _may_be_hub(source: str) -> bool:
    """Whether ``source`` has the form of a hub id, ``owner/name`` or ``owner/name:config``."""
    name = source.partition(":")[0]
    return bool(hub.ID.match(name)) and "/" in name and Path(source).suffix not in files.SUFFIXES


def _hub_splits(source: str) -> list[str]:
    import datasets

    name, _, config = source.partition(":")
    offline = hub.offline()
    try:
        with _without_network(offline):
            return datasets.get_dataset_split_names(name, config or None)
    except Exception as error:  # many libraries fail below this call, each in its own way
        state = "the hub cannot be reached and it is not in the local cache" if offline else hub.reason(error)
        raise UserError(f"data.eval_source {source}: its splits cannot be listed: {state}; set data.eval_split") from None


def open_source(source: str, split: str | None, max_rows: int | None, seed: int) -> Source:
    """The source that ``data.source`` names; only a hub id touches the network. Raises UserError.

    ``split`` None: of files that no split is named for.
    """
    if source.startswith("embedded:"):
        from jaxreason.data import embedded

        return _inline(source, embedded.examples(source.removeprefix("embedded:"), split, max_rows, seed))
    if source.startswith("reasoning-gym:"):
        from jaxreason.data import gym

        return _inline(source, gym.examples(source.removeprefix("reasoning-gym:"), split, max_rows, seed))
    path = expanded(source, "data.source")
    if path.exists():
        paths = files.find(source, path, split)
        # The time of the last change of a file's inode cannot be set back, as that of its content can.
        stamps = [[str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns] for f in paths]
        total = sum(map(files.weight, paths))
        return Source(source, total, lambda: itertools.chain.from_iterable(map(files.chunks, paths)), _digest(stamps))
    if _may_be_hub(source):
        name, _, config = source.partition(":")
        return _hub(name, config or None, split)
    raise UserError(
        f"data.source {source}: no such file or directory; give a {', '.join(files.SUFFIXES)} file, a directory of "
        "them, a hub id (owner/name or owner/name:config), embedded:NAME, or reasoning-gym:NAME"
    )


def _hub(name: str, config: str | None, split: str | None) -> Source:
    import datasets

    offline = hub.offline()
    download = datasets.DownloadConfig(local_files_only=offline, max_retries=0 if offline else 3)
    try:
        with _without_network(offline):
            table = datasets.load_dataset(name, config, split=split, download_config=download)
    except Exception as error:  # many libraries fail below load_dataset, each in its own way
        state = "the hub cannot be reached and it is not in the local cache" if offline else hub.reason(error)
        raise UserError(f"data.source {name}: no such file, and as a hub data set: {state}; {hub.HELP}") from None
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"data.source {name}: data.split {split} is not one split; known: {', '.join(table)}")

    def chunks() -> Iterator[files.Chunk]:
        for start in range(0, len(table), files.CHUNK_ROWS):
            rows = tuple(table.select(range(start, min(start + files.CHUNK_ROWS, len(table)))))
            yield files.Inline(f"{name} ({split})", start, rows, len(rows))

    stamp = [name, config, split, len(table), sorted(file["filename"] for file in table.cache_files)]
    return Source(name, len(table), chunks, _digest(stamp))


@contextlib.contextmanager
def _without_network(offline: bool) -> Iterator[None]:
    """The hub client's offline switch, for one call: without it every request is retried for half a minute."""
    import datasets
    from huggingface_hub import constants

    saved = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = saved


def _inline(source: str, examples: Sequence[Example]) -> Source:
    def chunks() -> Iterator[files.Chunk]:
        for start in range(0, len(examples), files.CHUNK_ROWS):
            items = tuple(examples[start : start + files.CHUNK_ROWS])
            yield files.Inline(source, start, items, len(items))

    return Source(source, len(examples), chunks, _digest([repr(example) for example in examples]))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
