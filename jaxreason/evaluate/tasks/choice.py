"""Questions with lettered choices."""

import hashlib
from collections.abc import Sequence

from jaxreason.data.example import Reject
from jaxreason.evaluate.tasks import parse
from jaxreason.evaluate.tasks.numeric import text_of
from jaxreason.evaluate.tasks.task import Family, Problem, Row, Task

LETTERS = "ABCDEFGHIJ"


def show(problem: Problem) -> str:
    """The question and a line for each choice."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices)]
    return "\n".join([problem.question, *lines])


CHOICE = Family(
    'Answer with the letter of the right choice alone, as "The answer is X."',
    'Think step by step. End with "The answer is X.", where X is the letter of the right choice.',
    parse.letter, "accuracy", {"answer_in": "text", "symbolic": "never"}, show,
)  # fmt: skip


def _problem(question: str, choices: Sequence[str], right: int, solution: str | None = None, group: str | None = None) -> Problem:
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= right < len(choices):
        raise Reject("no right choice among 2 to 10")
    return Problem(question, LETTERS[right], tuple(str(choice).strip() for choice in choices), solution, group)


def labelled(row: Row) -> Problem:
    """allenai/ai2_arc, tau/commonsense_qa: ``choices`` is {text, label}, ``answerKey`` one of the labels (A… or 1…)."""
    choices = row.get("choices")
    if not isinstance(choices, dict) or not isinstance(choices.get("text"), list) or not isinstance(choices.get("label"), list):
        raise Reject("choices is not {text, label}")
    key = text_of(row, "answerKey")
    if key not in choices["label"]:
        raise Reject("answerKey is none of the labels")
    return _problem(text_of(row, "question"), choices["text"], choices["label"].index(key))


def mmlu(row: Row) -> Problem:
    """cais/mmlu: ``choices``, ``answer`` an index (or its letter), ``subject``."""
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list):
        raise Reject("choices is not a list")
    if isinstance(answer, str):
        answer = LETTERS.find(answer.strip()) if len(answer.strip()) == 1 else -1
    if not isinstance(answer, int):
        raise Reject("no answer")
    return _problem(text_of(row, "question"), choices, answer, group=str(row.get("subject") or "") or None)


def mmlu_pro(row: Row) -> Problem:
    """TIGER-Lab/MMLU-Pro: ``options`` (up to ten), ``answer_index``, ``category``, ``cot_content`` of the shown examples."""
    options, index = row.get("options"), row.get("answer_index")
    if not isinstance(options, list) or not isinstance(index, int):
        raise Reject("no options or no answer_index")
    thought = str(row.get("cot_content") or "").removeprefix("A: ").rpartition("The answer is")[0].strip() or None
    group = str(row.get("category") or "") or None
    return _problem(text_of(row, "question"), options, index, solution=thought, group=group)


def gpqa(row: Row) -> Problem:
    """Idavidrein/gpqa: ``Question``, ``Correct Answer``, ``Incorrect Answer 1`` to 3. Their order is that of a hash."""
    question, right = text_of(row, "Question"), text_of(row, "Correct Answer")
    choices = [right, *(text_of(row, f"Incorrect Answer {i}") for i in (1, 2, 3))]
    choices.sort(key=lambda choice: hashlib.sha256(f"{question}\n{choice}".encode()).digest())
    return _problem(question, choices, choices.index(right))


TASKS = (
    Task("arc_easy", CHOICE, labelled, "allenai/ai2_arc:ARC-Easy", shots="train", about="school science (arXiv 1803.05457)"),
    Task("arc_challenge", CHOICE, labelled, "allenai/ai2_arc:ARC-Challenge", shots="train", about="the harder part of ARC"),
    Task("commonsense_qa", CHOICE, labelled, "tau/commonsense_qa", "validation", "train", about="arXiv 1811.00937"),
    Task("mmlu", CHOICE, mmlu, "cais/mmlu:all", shots="dev", about="57 subjects (arXiv 2009.03300)"),
    Task("mmlu_pro", CHOICE, mmlu_pro, "TIGER-Lab/MMLU-Pro", shots="validation", about="up to ten choices (arXiv 2406.01574)"),
    Task("gpqa_diamond", CHOICE, gpqa, "Idavidrein/gpqa:gpqa_diamond", "train", about="198 hard questions (arXiv 2311.12022)"),
)
