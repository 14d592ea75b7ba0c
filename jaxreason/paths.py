"""Paths that a person gives: in a config, on a command line, in the environment."""

import os
import re
from pathlib import Path

from jaxreason.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def expanded(given: str | os.PathLike, key: str = "") -> Path:
    """``given`` as a path, without ``file://``, with ``~`` and ``~user`` replaced by that home directory.

    ``key`` names in a message where it was given. Raises UserError for what no file can be called, and where there is no such
    home (a container's user without a passwd entry, and ``HOME`` not set).
    """
    text = os.fspath(given).removeprefix("file://")
    where = f"{key} " if key else ""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{where}{text!r} holds half of a surrogate pair, which no path can; write it again") from None
    if "\0" in text:
        raise UserError(f"{where}{text!r} holds a zero byte, which no path can; write it again")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{where}{text}: there is no such home directory (is HOME set?); write the whole path") from None


def protocol(given: str | os.PathLike) -> str | None:
    """``s3`` of ``s3://bucket/file``; None of a path of this machine, which ``file:///dir/file`` is too."""
    match = _URL.match(os.fspath(given))
    return match[1] if match and match[1] != "file" else None


def local(given: str | os.PathLike, key: str = "") -> Path:
    """:func:`expanded`, of what must be a path of this machine. Raises UserError for the address of an object store too."""
    if (found := protocol(given)) is not None:
        raise UserError(
            f"{key + ' ' if key else ''}{given}: {found}:// is no path of this machine, and nothing is read or written there "
            "directly: mount the bucket (gcsfuse, rclone mount, SkyPilot's MOUNT_CACHED as in launch/skypilot-1x1.yaml) and give "
            "the path of the mount"
        )
    return expanded(given, key)
