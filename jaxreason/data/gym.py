"""Problems of the package reasoning-gym (arXiv 2505.24760): ``data.source=reasoning-gym:NAME?key=value&key=value``.

The tasks are programs: an index and a seed make a problem. Which split a problem belongs to is decided by a hash of its
question, so no question is in both, whatever the seeds; a quarter of all goes to ``eval``.
"""

import hashlib
from typing import Any

import yaml

from jaxreason.data.example import Example
from jaxreason.errors import UserError
from jaxreason.plugins import nearest

SPLITS = ("train", "eval")
ROWS = {"train": 2_000, "eval": 200}
_EVAL_OF = 4  # one question in this many is held out
_TRIES = 20  # drawn problems for a wanted one, before a task counts as exhausted


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % _EVAL_OF == 0


def examples(name: str, split: str | None, n: int | None, seed: int) -> list[Example]:
    """The first ``n`` different problems of a split; fewer where the task runs out of new ones.

    The gold is the task's own answer; ``Example.row`` is the whole entry, by which the reward ``reasoning_gym`` grades.
    Raises UserError for a missing package, an unknown task, parameter or split, and a task without a problem.
    """
    if split not in SPLITS:
        raise UserError(f"reasoning-gym:{name}: no split {split!r}; it has {' and '.join(SPLITS)}")
    n = ROWS[split] if n is None else n
    found: dict[str, Example] = {}
    most = n * _TRIES + 100
    task = _open(name, most, seed)
    for index in range(most):
        if len(found) == n:
            break
        entry = task[index]
        question = entry["question"].strip()
        if question in found or is_held_out(question) != (split == "eval"):
            continue
        # Some tasks have no single answer: their own grader needs the entry alone.
        gold = str(entry["answer"]) if entry["answer"] is not None else "graded by the task"
        found[question] = Example(question, gold=gold, row=entry)
    if n and not found:
        raise UserError(f"reasoning-gym:{name}: no problem of split {split} among {most}; change its parameters")
    return list(found.values())


def _open(name: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(f"reasoning-gym:{name} needs the package: pip install 'jaxreason[gym]'") from None
    base, _, query = name.partition("?")
    if base not in DATASETS:
        raise UserError(f"reasoning-gym:{name}: no task {base!r}{nearest(base, DATASETS)}; known: {', '.join(sorted(DATASETS))}")
    values: dict[str, Any] = {}
    for word in query.split("&") if query else ():
        key, equals, text = word.partition("=")
        if not equals or key in values or key in ("seed", "size"):
            raise UserError(
                f"reasoning-gym:{name}: {word!r} is not one key=value for each parameter of the task; "
                "run.seed and data.max_rows set seed and size"
            )
        values[key] = yaml.safe_load(text)
    try:
        return reasoning_gym.create_dataset(base, size=size, seed=seed, **values)
    except Exception as error:  # dataclass and assertion errors of the task's own checks
        raise UserError(f"reasoning-gym:{name}: the task refuses its parameters: {error}") from None
