"""Graded answers in a JSONL file, so that work that was cut off goes on where it stopped."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from jaxreason.errors import UserError

FILE = "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """Something drawn for a problem. Its key is (settings, problem, sample)."""

    settings: str  # digest of all that decides what is drawn: model, task, prompts, strategy, sampling
    problem: str  # digest
    sample: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.settings, self.problem, self.sample


@dataclasses.dataclass(frozen=True)
class Answer(Record):
    """One graded answer of an evaluation."""

    answer: str | None  # as read from the final span
    correct: bool | None  # None: the grader failed, or the gold cannot be read
    truncated: bool
    tokens: int  # drawn for this answer, by all that the strategy asked
    read: int  # prompt tokens that were read for it
    completion: str
    question: str
    gold: str
    details: dict[str, Any]


Kind = TypeVar("Kind", bound=Record)


def digest(settings: dict[str, Any]) -> str:
    """Tells settings from others."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()[:16]


class Records(Generic[Kind]):
    """Records of one kind and any number of settings in one file; without a folder they are kept in memory alone.

    What a killed process was writing, a last line without its end, is cut off. Raises UserError for any other damage.
    """

    def __init__(self, folder: Path | None, kind: type[Kind], name: str = FILE):
        self._answers: dict[tuple[str, str, int], Kind] = {}
        self.path = None if folder is None else folder / name
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.read_bytes() if self.path.is_file() else b""
        whole = written[: written.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                answer = kind(**json.loads(line))
            except (ValueError, TypeError) as error:
                what = f"not a graded {kind.__name__.lower()} ({error})"
                raise UserError(f"{self.path}, line {number}: {what}; remove the line or the file") from None
            self._answers[answer.key] = answer
        if len(whole) < len(written):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))

    def find(self, settings: str, problem: str, samples: int) -> list[Kind] | None:
        """All of a problem's answers, or None where one is missing."""
        found = [self._answers.get((settings, problem, sample)) for sample in range(samples)]
        whole = [answer for answer in found if answer is not None]
        return whole if len(whole) == samples else None

    def add(self, answers: Iterable[Kind]) -> None:
        """Keeps the answers that are new; a problem that its task has twice has one answer."""
        lines = []
        for answer in answers:
            if answer.key not in self._answers:
                lines.append(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n")
                self._answers[answer.key] = answer
        if self.path is not None:
            with open(self.path, "ab") as file:
                file.write("".join(lines).encode("utf-8", "replace"))
