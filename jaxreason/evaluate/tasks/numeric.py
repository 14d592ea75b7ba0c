"""Questions whose answer is a number or a formula."""

import re
from typing import Any

from jaxreason.data.example import Reject
from jaxreason.evaluate.tasks import parse
from jaxreason.evaluate.tasks.task import Family, Problem, Row, Task
from jaxreason.text import last_boxed

_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
_DIRECT = 'Give the answer alone, without any explanation, as "The answer is N."'
_COT = 'Think step by step. End with "The answer is N.", where N is the final answer.'
NUMBER = Family(_DIRECT, _COT, parse.number, "accuracy", {"answer_in": "text", "symbolic": "never"})
FORMULA = Family(
    r"Give the final answer alone, without any explanation, in \boxed{}.",
    r"Think step by step, and put your final answer within \boxed{}.",
    parse.expression, "accuracy", {"answer_in": "text"}, answer=lambda problem: rf"\boxed{{{problem.gold}}}",
)  # fmt: skip


def text_of(row: Row, *columns: str) -> str:
    """The first of ``columns`` that holds a text or a number. Raises Reject where none does."""
    for name in columns:
        value: Any = row.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    raise Reject(f"no {columns[0]}")


def gsm8k(row: Row) -> Problem:
    """openai/gsm8k: ``question``; ``answer`` is a solution, ``####`` and the number."""
    solution, marked, gold = text_of(row, "answer").rpartition("####")
    if not marked:
        raise Reject("answer without ####")
    return Problem(text_of(row, "question"), gold.strip(), solution=_CALCULATION.sub("", solution).strip())


def gsm_plus(row: Row) -> Problem:
    """qintongli/GSM-Plus: ``question``, ``solution``, ``answer``, ``perturbation_type``. Rows of "critical thinking" lack what
    an answer needs, and have none."""
    gold = text_of(row, "answer")
    if gold == "None":
        raise Reject("a question without an answer (critical thinking)")
    return Problem(text_of(row, "question"), gold, solution=str(row.get("solution") or "").partition("####")[0].strip() or None)


def contest(row: Row) -> Problem:
    """AIME, AMC, MATH: ``problem`` with ``answer``, or with the last box of ``solution``. ``142.0`` is 142."""
    question = text_of(row, "problem", "question", "Problem")
    boxed = last_boxed(str(row.get("solution") or row.get("Solution") or ""))
    answer = text_of({"answer": row.get("answer", row.get("Answer", row.get("expected_answer"))), "box": boxed}, "answer", "box")
    solution = row.get("solution") or row.get("Solution")
    return Problem(question, answer.removesuffix(".0"), solution=str(solution).strip() if solution else None)


TASKS = (
    Task("gsm8k", NUMBER, gsm8k, "openai/gsm8k:main", shots="train", about="grade-school word problems (arXiv 2110.14168)"),
    Task("gsm_plus", NUMBER, gsm_plus, "qintongli/GSM-Plus", about="GSM8K, perturbed in seven ways (arXiv 2402.19255)"),
    Task("math500", FORMULA, contest, "HuggingFaceH4/MATH-500", about="500 test problems of MATH (arXiv 2305.20050)"),
    Task("aime24", NUMBER, contest, "HuggingFaceH4/aime_2024", "train", about="30 problems; use avg@32 or more"),
    Task("aime25", NUMBER, contest, "math-ai/aime25", about="30 problems; use avg@32 or more"),
    Task("amc", NUMBER, contest, "AI-MO/aimo-validation-amc", "train", about="83 problems of AMC 12"),
)
