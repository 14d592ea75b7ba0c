"""Files of a directory that somebody else made: found by a plain name, regular, and inside of it."""

import concurrent.futures
import hashlib
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxreason.errors import UserError

SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-f]{64})  ([^/\0]+)")


def find(directory: Path, name: str) -> Path | None:
    """The file ``name`` of a model's directory; None if there is none.

    Raises UserError for a name that leads elsewhere (``../x``, ``/x``), for a link out of the directory, and for what is
    no regular file, such as a pipe, on which reading would wait for ever. The links of the hub's cache, which lead to its
    ``blobs``, are followed.
    """
    if not isinstance(name, str) or not name or Path(name).name != name or name == ".." or "\0" in name:
        raise UserError(f"{directory}: {name!r} is not the name of a file in this directory; download or export it again")
    path = directory / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a directory whose files can be read") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file; give a directory that holds the file itself")
    own = directory.resolve()
    inside = [own, own.parent.parent / "blobs"] if own.parent.name == "snapshots" else [own]
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise UserError(f"{path} is a link to {path.resolve()}, outside of the directory; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download or export it again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; it is a JSON object")
    return value


def write_sums(directory: Path) -> None:
    """Writes SHA256SUMS over the directory's files, as ``sha256sum --check`` reads it."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != SUMS)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        lines = [f"{found}  {path.name}\n" for found, path in zip(pool.map(_digest, files), files)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path, wanted: Callable[[str], bool]) -> None:
    """Checks the files whose names are ``wanted`` against SHA256SUMS, where there is one. Raises UserError.

    A file that is wanted and not listed is refused too: a damaged name would otherwise go unseen. Sums that list none that is
    wanted, and whose own files are all there, are of something else that was put in the directory, such as a tokenizer.
    """
    sums = find(directory, SUMS)
    if sums is None:
        return
    fix = f"copy or export it again; if you changed it on purpose, remove {SUMS}"
    listed: dict[str, str] = {}
    for number, line in enumerate(sums.read_bytes().decode("utf-8", "replace").removesuffix("\n").split("\n"), 1):
        if (match := _SUM.fullmatch(line)) is None:
            raise UserError(f"{sums}, line {number}: not a sum and a file's name; {fix}")
        listed[match[2]] = match[1]
    present = {path.name for path in directory.iterdir() if path.is_file() and path.name != SUMS}
    concerned = any(map(wanted, listed)) or not listed.keys() <= present
    names = sorted(name for name in (present if concerned else set()) | listed.keys() if wanted(name))
    for name in names:
        if name not in listed or name not in present:
            raise UserError(f"{directory / name}: {'missing' if name in listed else f'not listed in {SUMS}'}; {fix}")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, found in zip(names, pool.map(lambda name: _digest(directory / name), names)):
            if found != listed[name]:
                raise UserError(f"{directory / name}: its content is not what was saved ({SUMS} differs); {fix}")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
