"""The tasks of reasoning-gym grade themselves."""

import functools
from typing import Any

from jaxreason.errors import UserError
from jaxreason.rewards.answer import AnswerIn, extract
from jaxreason.rewards.sample import Sample


def reasoning_gym(sample: Sample, *, answer_in: AnswerIn = "auto", partial: str = "keep") -> float:
    """The task's score, 0 to 1, of the final answer; 0 without one.

    Args:
      answer_in: where the answer is, as in ``accuracy``.
      partial: ``keep`` the scores between 0 and 1 that many tasks give for near answers, or ``drop`` them to 0.
    Raises UserError for a sample that is of no ``reasoning-gym:`` source, and without the package.
    """
    if partial not in ("keep", "drop"):
        raise ValueError(f"partial is {partial!r}; it is keep or drop")
    task = ((sample.row or {}).get("metadata") or {}).get("source_dataset")
    if task is None:
        raise UserError("reward reasoning_gym grades problems of data.source=reasoning-gym:NAME only")
    answers = extract(sample, answer_in=answer_in)
    if not answers:
        return 0.0
    score = float(grader(task)(answers[-1], sample.row))
    return score if partial == "keep" or score >= 1.0 else 0.0


@functools.cache
def grader(task: str) -> Any:
    try:
        import reasoning_gym as package
    except ImportError:
        raise UserError("reward reasoning_gym needs the package: pip install 'jaxreason[gym]'") from None
    return package.get_score_answer_fn(task)


def prepare(**_: object) -> None:
    """Imports what a worker will need, so that no sample's time limit pays for it."""
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        raise UserError("reward reasoning_gym needs the package: pip install 'jaxreason[gym]'") from None
