"""What became of a source's rows: how many of which format, and how many cannot be used, by reason."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from jaxreason.data.example import Reject
from jaxreason.data.schema import HINTS

_MOST_REASONS = 100  # of a file whose every row has a reason of its own


@dataclasses.dataclass
class Tally:
    """``rejects`` has, for each reason, ``count``, and ``first``: the first such row with its number and what it holds."""

    rows: int = 0
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rejects: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def reject(self, reject: Reject, place: Callable[[], str]) -> None:
        reason = reject.reason
        if reason not in self.rejects:
            reason = reason if len(self.rejects) < _MOST_REASONS else "one of many other reasons"
        if reason not in self.rejects:
            self.rejects[reason] = {"count": 0, "first": f"{place()}: {reject.detail}" if reject.detail else place()}
        self.rejects[reason]["count"] += 1

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: entry["count"] for reason, entry in self.rejects.items()}

    @property
    def first_dropped(self) -> dict[str, str]:
        return {reason: entry["first"] for reason, entry in self.rejects.items()}


def reasons(dropped: dict[str, int], first: dict[str, str]) -> str:
    """``(no answer: 3, role tool: 1; first: f.jsonl, line 7)`` and what mends it, for the message that no row is of use."""
    ordered = sorted(dropped, key=lambda reason: -dropped[reason])
    told = ", ".join(f"{reason}: {dropped[reason]}" for reason in ordered) or "none read"
    example = next((first[reason] for reason in ordered if reason in first), None)
    hints = [HINTS[reason] for reason in ordered if reason in HINTS]
    return f"({told}{f'; first: {example}' if example else ''})" + "".join(f"; {hint}" for hint in hints)
