"""Benchmarks by name: ``TASKS`` is all of them, as data. A family is a file: its readers, its prompts, its parser, its grader."""

from jaxreason.evaluate.tasks import choice, numeric, puzzles
from jaxreason.evaluate.tasks.task import Family, Problem, Protocol, Task, ask

__all__ = ["TASKS", "Family", "Problem", "Protocol", "Task", "ask"]

TASKS: dict[str, Task] = {task.name: task for task in (*numeric.TASKS, *choice.TASKS, *puzzles.TASKS)}
