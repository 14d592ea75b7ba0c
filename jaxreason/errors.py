"""The one exception that a person's input can cause, and what the system's refusals mean."""

import errno
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user gave cannot be used: the message names the file, key or row, what was found, and the fix.

    Scripts print the message alone and exit with status 2, as they do after an OSError (:func:`explain`). Everything else that
    is raised is a defect of jaxreason.
    """


_FIXES = {
    errno.ENOSPC: "free some space there, or give a place on another disk (run.dir, data.cache_dir, TMPDIR)",
    errno.EDQUOT: "free some space there, or give a place on another disk (run.dir, data.cache_dir, TMPDIR)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "give a place that can be written (run.dir, data.cache_dir, JAXREASON_CACHE, TMPDIR)",
    errno.EACCES: "give a place that this user may read and write, or change its permissions",
    errno.EPERM: "give a place that this user may read and write, or change its permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n 65536), or use fewer workers",
    errno.ENFILE: "the whole machine has too many open files; close some",
    errno.ENOENT: "it is not there, or was moved or deleted meanwhile: put it back, or give another path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EIO: "the disk or the network file system fails; look at the system's log (dmesg)",
    errno.ESTALE: "the network file system lost it; run the same command again",
    errno.EPIPE: "what read the output has ended",
    errno.ENOMEM: "the machine is out of memory: use fewer workers or a smaller model",
}


def explain(error: OSError) -> str:
    """One line of what the operating system refused: the path, its reason and what mends it."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f"{' -> '.join(names)}: " if names else ""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{where}{reason}; {_FIXES.get(error.errno or 0, 'mend that and run the same command again')}"


def present(value: T | None, what: str) -> T:
    """An optional ``value`` where it is needed. Raises UserError, which says that ``what`` is missing, if it is None."""
    if value is None:
        raise UserError(f"{what} is needed here, but it is None")
    return value
