"""What ``data.source`` names: files, a hub data set, or a program that writes examples."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxreason.data import files, hub
from jaxreason.data.chunks import CHUNK_ROWS, Chunk, Inline
from jaxreason.data.example import Example
from jaxreason.errors import UserError

if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a source, which is read from its beginning on."""

    chunks: Callable[[], Iterator[Chunk]]
    stamp: Any  # JSON-able; tells it from other shards wherever it is: name, size and tag or time


@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    shards: tuple[Shard, ...]
    weigh: Callable[[], int]  # sum of the chunks' weights, which may have to open every file; 0: not known
    fingerprint: str  # changes with the rows; for files by path, size and times, so it may also change without them
    unread: tuple[str, ...] = ()  # files that are there and not read, with why

    def chunks(self) -> Iterator[Chunk]:
        return itertools.chain.from_iterable(shard.chunks() for shard in self.shards)


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
    names = _hub_splits(source) if not files.exists(source) and _may_be_hub(source) else files.splits(source)
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
    if not splits_itself(source) and files.exists(source):
        found = files.find(source, split).files
        return frozenset(str(file.resolve() if isinstance(file, Path) else file) for file in found)
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


def open_source(source: str, split: str | None, max_rows: int | None, seed: int, streaming: bool = False) -> Source:
    """The source that ``data.source`` names; only a hub id and an address touch the network. Raises UserError.

    ``split`` None: of files that no split is named for. ``streaming``: a hub data set is read where it is, not downloaded.
    """
    if source.startswith("embedded:"):
        from jaxreason.data import embedded

        return _inline(source, embedded.examples(source.removeprefix("embedded:"), split, max_rows, seed))
    if source.startswith("reasoning-gym:"):
        from jaxreason.data import gym

        return _inline(source, gym.examples(source.removeprefix("reasoning-gym:"), split, max_rows, seed))
    if files.exists(source):
        found = files.find(source, split)
        shards = tuple(Shard(functools.partial(files.chunks, file), files.stamp(file)) for file in found.files)
        weigh = lambda: sum(map(files.weight, found.files))  # noqa: E731
        return Source(source, shards, weigh, _digest([files.exact_stamp(file) for file in found.files]), tuple(found.unread))
    if _may_be_hub(source):
        name, _, config = source.partition(":")
        return (hub_stream if streaming else _hub)(name, config or None, split)
    raise UserError(
        f"data.source {source}: no such file or directory; give a {', '.join(files.SUFFIXES)} file, a directory of "
        "them, a pattern (data/*.jsonl), an address (s3://, gs://, hf://, https://), a hub id (owner/name or owner/name:config), "
        "embedded:NAME, or reasoning-gym:NAME"
    )


def _hub(name: str, config: str | None, split: str | None) -> Source:
    import datasets

    offline = hub.offline()
    download = datasets.DownloadConfig(local_files_only=offline, max_retries=0 if offline else 3)
    with _of_hub(name, offline, "the hub cannot be reached and it is not in the local cache"):
        table = datasets.load_dataset(name, config, split=split, download_config=download)
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"data.source {name}: data.split {split} is not one split; known: {', '.join(table)}")

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(table), CHUNK_ROWS):
            rows = tuple(table.select(range(start, min(start + CHUNK_ROWS, len(table)))))
            yield Inline(f"{name} ({split})", start, rows, len(rows))

    stamp = [name, config, split, len(table), sorted(file["filename"] for file in table.cache_files)]
    return Source(name, (Shard(chunks, stamp),), lambda: len(table), _digest(stamp))


def hub_stream(name: str, config: str | None, split: str | None) -> Source:
    """A data set of the hub, or a directory laid out like one, whose rows are read where they are. Raises UserError.

    Its shards are those of ``datasets``: files of the split, at the commit that is the newest now. What tells them from others
    are their addresses, with that commit, or the time of a local file.
    """
    import datasets

    offline = hub.offline() and not Path(name).is_dir()
    with _of_hub(name, offline, "the hub cannot be reached"):
        builder = datasets.load_dataset_builder(name, config)
        table = builder.as_streaming_dataset(split=split)
    if not isinstance(table, datasets.IterableDataset):
        raise UserError(f"data.source {name}: data.split {split} is not one split; known: {', '.join(table)}")
    listed = (builder.config.data_files or {}).get(split, [])
    found = [[file, *map(str, origin)] for file, origin in zip(listed, getattr(listed, "origin_metadata", ()))]
    stamp = [name, config, split, builder.hash, table.num_shards, found]
    shards = (Shard(functools.partial(_streamed, name, split, table, index), [index, stamp]) for index in range(table.num_shards))
    return Source(name, tuple(shards), lambda: 0, _digest(stamp))


def _streamed(name: str, split: str | None, table: "datasets.IterableDataset", index: int) -> Iterator[Chunk]:
    """The rows of a shard. Raises UserError."""
    first, rows = 0, iter(table.shard(table.num_shards, index))
    while True:
        with _of_hub(f"{name} ({split}, shard {index + 1} of {table.num_shards}), near row {first + 1}", False, ""):
            items = tuple(itertools.islice(rows, CHUNK_ROWS))
        if not items:
            return
        yield Inline(f"{name} ({split}, shard {index + 1} of {table.num_shards})", first, items, len(items))
        first += len(items)


@contextlib.contextmanager
def _of_hub(name: str, offline: bool, unreachable: str) -> Iterator[None]:
    """Raises UserError for what goes wrong at the hub, ``unreachable`` where there is no network."""
    try:
        with _without_network(offline):
            yield
    except Exception as error:  # many libraries fail below these calls, each in its own way
        state = unreachable if offline else hub.reason(error)
        raise UserError(f"data.source {name}: no such file, and as a hub data set: {state}; {hub.HELP}") from None


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
    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(examples), CHUNK_ROWS):
            items = tuple(examples[start : start + CHUNK_ROWS])
            yield Inline(source, start, items, len(items))

    fingerprint = _digest([repr(example) for example in examples])
    return Source(source, (Shard(chunks, fingerprint),), lambda: len(examples), fingerprint)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
