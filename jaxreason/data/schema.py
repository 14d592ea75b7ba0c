"""Row formats: how a row of each known data set becomes an Example.

A format is a detector over column names and a parser. Parsers raise Reject for a row they cannot use; ``SCHEMAS``
lists the columns of each. Earlier assistant turns lose their thoughts, as they do when a reasoning model is
asked a second question.
"""

import json
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from jaxreason.data.example import Example, Reject, split_thought
from jaxreason.errors import UserError
from jaxreason.text import last_boxed

__all__ = ["SCHEMAS", "Example", "Reject", "Schema", "detect", "parse", "require_correctness"]

Row = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_CORRECTNESS = (
    "correct",
    "is_correct",
    "correctness",
    "deepseek_grade",
    "correctness_math_verify",
    "correctness_llama",
)


class Schema(NamedTuple):
    detect: Callable[[Set[str]], bool]
    parse: Callable[[Row, bool], Example]
    columns: str  # for messages


def detect(columns: Set[str], where: str) -> str:
    """Name of the first format whose columns are all there. Raises UserError."""
    for name, schema in SCHEMAS.items():
        if schema.detect(columns):
            return name
    known = "; ".join(f"{name}: {schema.columns}" for name, schema in SCHEMAS.items())
    raise UserError(
        f"{where}: columns {', '.join(sorted(columns)) or '(none)'} match no known row format; rename them or set "
        f"data.schema. Known: {known}"
    )


def parse(row: Row, schema: str, keep_only_correct: bool) -> Example:
    """The row as an Example; with ``keep_only_correct`` only if a correctness column says so. Raises Reject."""
    # OpenR1 rows are judged per generation, inside their parser.
    if keep_only_correct and schema != "openr1":
        verdict = _verdict(row)
        if verdict is None:
            raise Reject("correctness unknown")
        if not verdict:
            raise Reject("marked incorrect")
    return SCHEMAS[schema].parse(row, keep_only_correct)


def require_correctness(columns: Set[str], where: str) -> None:
    """Raises UserError where ``data.keep_only_correct`` has no column to look at."""
    if not any(name in columns for name in _CORRECTNESS):
        raise UserError(
            f"{where}: data.keep_only_correct needs one of the columns {', '.join(_CORRECTNESS)}; "
            f"the rows have {', '.join(sorted(columns))}. Set data.keep_only_correct=false or add the column"
        )


# --- columns ---------------------------------------------------------------------------------------------------------


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise Reject(f"no {column}")
    if not isinstance(value, str):
        raise Reject(f"{column} is not text")
    if not value.strip():
        raise Reject(f"empty {column}")
    return value.strip()


def _optional(row: Row, column: str) -> str | None:
    value = row.get(column)
    return value.strip() or None if isinstance(value, str) else None


def _gold(row: Row, *columns: str) -> str | None:
    """The first of ``columns`` that holds a text or a number, as text."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return None


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"yes": True, "true": True, "correct": True, "1": True}.get(value.strip().lower(), False)
    return None if value is None else bool(value)


def _verdict(row: Row) -> bool | None:
    for column in _CORRECTNESS:
        value = row.get(column)
        if isinstance(value, list):
            known = [_truth(item) for item in value if item is not None]
            value = any(known) if known else None
        if value is not None:
            return _truth(value)
    return None


def _flags(row: Row, column: str, count: int) -> list[bool | None]:
    values = row.get(column)
    return [_truth(value) for value in values] if isinstance(values, list) and len(values) == count else [None] * count


def _system(row: Row) -> str | None:
    """The system column, unless it asks for the tags that ``split_thought`` has just replaced by ``<think>``."""
    system = _optional(row, "system")
    return None if system is not None and "<|begin_of_thought|>" in system else system


# --- conversations ---------------------------------------------------------------------------------------------------


def _turns(row: Row, column: str, role_key: str, text_key: str) -> list[tuple[str, str]]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise Reject(f"{column} is empty or not a list")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
            raise Reject(f"{column} has a turn without {role_key}")
        role = _ROLES.get(turn[role_key], turn[role_key])
        if role not in ("system", "user", "assistant"):
            raise Reject(f"role {role!r}")
        turns.append((role, _text(turn, text_key)))
    return turns


def _conversation(turns: list[tuple[str, str]], system: str | None, gold: str | None) -> Example:
    if turns[0][0] == "system":
        system = turns[0][1] if system is None else system
        turns = turns[1:]
    if any(role == "system" for role, _ in turns):
        raise Reject("system turn inside the conversation")
    think = answer = None
    if turns and turns[-1][0] == "assistant":
        think, answer = split_thought(turns[-1][1])
        turns = turns[:-1]
    if not turns or turns[-1][0] != "user":
        raise Reject("last assistant turn follows no user turn")
    history = tuple((role, split_thought(text)[1] if role == "assistant" else text) for role, text in turns[:-1])
    if system is not None and "<|begin_of_thought|>" in system:
        system = None
    return Example(turns[-1][1], answer, think, system, gold, history)


def _messages(row: Row, _: bool) -> Example:
    gold = _gold(row, "gold", "ground_truth", "expected_answer", "answer")
    return _conversation(_turns(row, "messages", "role", "content"), _system(row), gold)


def _conversations(row: Row, _: bool) -> Example:
    turns = row.get("conversations")
    named = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]
    keys = ("role", "content") if named else ("from", "value")
    gold = _gold(row, "gold", "ground_truth", "expected_answer", "answer")
    return _conversation(_turns(row, "conversations", *keys), _system(row), gold)


def _prompt_completion(row: Row, _: bool) -> Example:
    gold = _gold(row, "gold", "ground_truth", "answer")
    if isinstance(row.get("prompt"), list):
        turns = _turns(row, "prompt", "role", "content")
        if isinstance(row.get("completion"), list):
            turns += _turns(row, "completion", "role", "content")
        else:
            turns.append(("assistant", _text(row, "completion")))
        return _conversation(turns, _system(row), gold)
    # The chat template writes the roles, so a "User: ... Assistant:" frame would be said twice.
    user = _text(row, "prompt").removeprefix("User:").removesuffix("Assistant:").strip()
    if not user:
        raise Reject("empty prompt")
    think, answer = split_thought(_text(row, "completion"))
    return Example(user, answer, think, _system(row), gold)


# --- data sets -------------------------------------------------------------------------------------------------------


def _openr1(row: Row, keep_only_correct: bool) -> Example:
    """The first complete and correct generation; without ``keep_only_correct``, else the first complete one."""
    generations = row.get("generations")
    if not isinstance(generations, list) or not generations:
        raise Reject("no generations")
    count = len(generations)
    complete = [flag is not False for flag in _flags(row, "is_reasoning_complete", count)]
    reasons = row.get("finish_reasons")
    if isinstance(reasons, list) and len(reasons) == count:
        complete = [flag and reason != "length" for flag, reason in zip(complete, reasons)]
    verdicts = zip(_flags(row, "correctness_math_verify", count), _flags(row, "correctness_llama", count))
    correct = [bool(a or b) for a, b in verdicts]
    usable = [i for i in range(count) if complete[i] and isinstance(generations[i], str)]
    if not usable:
        raise Reject("no complete generation")
    right = [i for i in usable if correct[i]]
    if keep_only_correct and not right:
        raise Reject("no correct complete generation")
    think, answer = split_thought(generations[(right or usable)[0]])
    return Example(_text(row, "problem"), answer, think, _system(row), _gold(row, "answer"))


def _openthoughts_metadata(row: Row, _: bool) -> Example:
    gold = last_boxed(_optional(row, "ground_truth_solution") or "")
    think, answer = _text(row, "deepseek_reasoning"), _text(row, "deepseek_solution")
    return Example(_text(row, "problem"), answer, think, gold=gold)


def _s1(row: Row, _: bool) -> Example:
    if "deepseek_thinking_trajectory" in row:
        think, answer = _text(row, "deepseek_thinking_trajectory"), _text(row, "deepseek_attempt")
    else:
        trajectories = row.get("thinking_trajectories")
        if not isinstance(trajectories, list) or not trajectories or not isinstance(trajectories[0], str):
            raise Reject("no thinking_trajectories")
        think, answer = trajectories[0].strip(), _text(row, "attempt")
    return Example(_text(row, "question"), answer, think, gold=last_boxed(_optional(row, "solution") or ""))


def _dolphin_r1(row: Row, _: bool) -> Example:
    turns = [*_turns(row, "messages", "role", "content"), ("assistant", _text(row, "answer"))]
    example = _conversation(turns, _system(row), None)
    return Example(example.user, example.answer, _text(row, "reasoning"), example.system, None, example.history)


def _r1_distill(row: Row, _: bool) -> Example:
    think, answer = split_thought(_text(row, "reannotated_assistant_content"))
    gold = last_boxed(_optional(row, "solution") or "")
    return Example(_text(row, "problem"), answer, think, _system(row), gold)


def _countdown(row: Row, _: bool) -> Example:
    """The gold is JSON, ``{"nums": [...], "target": n}``, because any correct equation is an answer."""
    nums, target = row["nums"], row["target"]
    if not isinstance(nums, list) or not nums or not all(isinstance(n, (int, float)) for n in [*nums, target]):
        raise Reject("nums or target is not a number")
    user = (
        f"Combine the numbers {', '.join(str(n) for n in nums)} into an expression that equals {target}. Use each "
        "number exactly once, with + - * / and parentheses only. Give the expression alone as the final answer."
    )
    return Example(user, gold=json.dumps({"nums": nums, "target": target}))


def _problem_answer(row: Row, _: bool) -> Example:
    solution = _optional(row, "generated_solution") or _optional(row, "solution")
    gold = _gold(row, "expected_answer", "answer") or last_boxed(solution or "")
    think, answer = split_thought(solution) if solution else (None, None)
    return Example(_text(row, "problem"), answer, think, _system(row), gold)


def _question_answer(row: Row, _: bool) -> Example:
    """GSM8K and plain question/answer rows: the gold is what follows ``####``, or all of a short answer."""
    user = _text(row, "question" if "question" in row else "prompt")
    text = _gold(row, "answer", "gold")
    if text is None:
        raise Reject("no answer")
    think, answer = split_thought(text)
    final = answer.rpartition("####")[2].strip() if "####" in answer else last_boxed(answer) or answer
    return Example(user, answer, think, _system(row), _gold(row, "gold") or final)


def _example(row: Row, _: bool) -> Example:
    answer = _optional(row, "answer")
    if answer is None:
        think = None
    elif "think" in row:
        think = _optional(row, "think")
    else:
        think, answer = split_thought(answer)
    return Example(_text(row, "user"), answer, think, _optional(row, "system"), _gold(row, "gold"))


def _plain_text(row: Row, _: bool) -> Example:
    return Example(None, _text(row, "text"))


def _needs(parse: Callable[[Row, bool], Example], *columns: str) -> Schema:
    """A format that is known by ``columns``; ``a|b`` is one of two."""
    choices = [column.split("|") for column in columns]
    return Schema(lambda there: all(any(c in there for c in either) for either in choices), parse, ", ".join(columns))


# The first match wins, so formats with more specific columns come first.
SCHEMAS: dict[str, Schema] = {
    "openr1": _needs(_openr1, "problem", "generations"),
    "openthoughts_metadata": _needs(_openthoughts_metadata, "problem", "deepseek_reasoning", "deepseek_solution"),
    "s1": _needs(_s1, "question", "deepseek_thinking_trajectory|thinking_trajectories", "deepseek_attempt|attempt"),
    "dolphin_r1": _needs(_dolphin_r1, "messages", "reasoning", "answer"),
    "r1_distill": _needs(_r1_distill, "problem", "reannotated_assistant_content"),
    "messages": _needs(_messages, "messages"),
    "conversations": _needs(_conversations, "conversations"),
    "prompt_completion": _needs(_prompt_completion, "prompt", "completion"),
    "countdown": _needs(_countdown, "nums", "target"),
    "problem_answer": _needs(_problem_answer, "problem", "expected_answer|answer|solution"),
    "example": _needs(_example, "user", "answer|gold"),
    "question_answer": _needs(_question_answer, "question|prompt", "answer|gold"),
    "text": _needs(_plain_text, "text"),
}
