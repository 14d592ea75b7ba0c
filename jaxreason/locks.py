"""Locks between processes, on open files: the system lets go of them when their owner ends, however it ends."""

import datetime
import fcntl
import glob
import os
import secrets
import shutil
import socket
from pathlib import Path
from typing import IO

from jaxreason.errors import UserError


def lock(file: IO | int, exclusive: bool) -> bool | None:
    """Whether an open file (or the descriptor of a directory) could be locked without waiting; it is until it is closed.

    None where the file system knows no locks (some that mount object stores): then nobody can say whose it is.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class Owner:
    """The one process that writes a folder, by an exclusive lock of ``FOLDER/lock``, whose text says who that is.

    ``fix`` says what else a person may do. Raises UserError, naming the owner, where another process has it.
    """

    NAME = "lock"

    def __init__(self, folder: Path, fix: str = "set run.name to another name"):
        self._file = open(folder / self.NAME, "a+")
        if lock(self._file, exclusive=True) is False:
            self._file.seek(0)
            found = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"{folder} is being written by {found}: wait until that run has ended, stop it, or {fix}"
            )
        self._say(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n")

    def release(self) -> None:
        """Lets another process have it. The file stays: to remove it would race with one that has opened it."""
        if not self._file.closed:
            self._say("")
            self._file.close()

    def _say(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


class Partial:
    """A new directory next to ``target``, in which something is made that becomes ``target`` at once, or never.

    It is locked while it is made. What killed makers left is removed: of the same target, or with ``all_targets`` of every
    one in this place, which is then a place of ours alone. Use it in a ``with``, which discards what was not committed.
    """

    def __init__(self, target: Path, all_targets: bool = False):
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        name = "*" if all_targets else glob.escape(target.name)
        for left in target.parent.glob(f".{name}.????????.partial"):
            _remove_abandoned(left)
        self.path = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
        self.path.mkdir()
        self._descriptor = os.open(self.path, os.O_RDONLY)
        lock(self._descriptor, exclusive=True)
        self._open = True

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def commit(self) -> None:
        """Gives it the target's name. Raises OSError if there is one by now that holds anything."""
        os.rename(self.path, self.target)
        self._close()

    def discard(self) -> None:
        """Removes it, unless it was committed."""
        if self._open:
            shutil.rmtree(self.path, ignore_errors=True)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._open = False


def _remove_abandoned(path: Path) -> None:
    """Removes a directory that nobody makes any more; where that cannot be known it stays."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # it has gone, or it is not a directory
    try:
        if lock(descriptor, exclusive=True):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
