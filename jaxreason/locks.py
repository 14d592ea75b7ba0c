"""Locks between processes, on open files: the system lets go of them when their owner ends, however it ends."""

import datetime
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from jaxreason.errors import UserError


def lock(file: IO, exclusive: bool) -> bool:
    """Whether the file could be locked without waiting; it stays so until it is closed.

    A file system that knows no locks (some that mount object stores) has none to refuse: there the answer is True.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class Owner:
    """The one process that writes a folder, by an exclusive lock of ``FOLDER/lock``, whose text says who that is.

    Raises UserError, naming the owner, where another process has it.
    """

    NAME = "lock"

    def __init__(self, folder: Path):
        self._file = open(folder / self.NAME, "a+")
        if not lock(self._file, exclusive=True):
            self._file.seek(0)
            found = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"{folder} is being written by {found}: wait until that run has ended, stop it, or set run.name to another name"
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
