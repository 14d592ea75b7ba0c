"""Files of a directory that somebody else made: found by a plain name, regular, and inside of it."""

import json
import stat
from pathlib import Path
from typing import Any

from jaxreason.errors import UserError


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
