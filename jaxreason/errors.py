"""The one exception that a person's input can cause."""

from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user gave cannot be used: the message names the file, key or row, what was found, and the fix.

    Scripts print the message alone and exit with status 2. Everything else that is raised is a defect of jaxreason.
    """


def present(value: T | None, what: str) -> T:
    """An optional ``value`` where it is needed. Raises UserError, which says that ``what`` is missing, if it is None."""
    if value is None:
        raise UserError(f"{what} is needed here, but it is None")
    return value
