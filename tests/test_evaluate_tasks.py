"""Benchmarks in their own row formats, from local files: what is asked, what is right, and what is said of wrong files."""

import json
import re

import data_helpers
import pytest
import scripted

from jaxreason import config as cfg
from jaxreason import rewards
from jaxreason.data import chat as chats
from jaxreason.data import tokenizer as tokenizers
from jaxreason.errors import UserError
from jaxreason.evaluate.exam import open_exam
from jaxreason.evaluate.tasks import TASKS
from jaxreason.evaluate.tasks.load import load, load_shots
from jaxreason.rewards.sample import Sample

# A row as the hub has it, a turn that is right, and turns that are wrong.
GSM = {"question": "How many?", "answer": "He has 6 * 7 = <<6*7=42>>42.\n#### 42"}
MATH = {"problem": "Half?", "solution": r"It is \boxed{\frac12}.", "answer": r"\frac12", "subject": "A", "level": 1,
        "unique_id": "u"}
PLUS = GSM | {"answer": "1,200", "solution": "So 1,200", "perturbation_type": "digit expansion",
        "seed_question": "q", "seed_answer": "1"}
ARC = {"id": "x", "question": "Which?", "choices": {"text": ["p", "q", "r"], "label": ["1", "2", "3"]}, "answerKey": "2"}
CSQA = {"question": "Where?", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "E",
        "question_concept": "c"}
MMLU = {"question": "Which?", "subject": "law", "choices": ["p", "q", "r", "s"], "answer": 3}
PRO = {"question_id": 1, "question": "Which?", "options": [f"o{i}" for i in range(10)], "answer": "I", "answer_index": 8,
       "cot_content": "A: Let's think step by step. It is o8. The answer is (I).", "category": "law", "src": "s"}  # fmt: skip
GPQA = {"Question": "Which?", "Correct Answer": "yes", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b",
        "Incorrect Answer 3": "c"}  # fmt: skip
VERDICT = {"question": "q", "model_output_steps": ["Step one.", "", "Step two."], "model_output_solution_correctness": "wrong",
           "model_output_solution_first_error_step": "2", "model_output_solution_first_error_reason": "r"}  # fmt: skip
ROWS = {
    "gsm8k": (GSM, "6 * 7 = 42. The answer is 42.", ["42 or 43", "The answer is 41."]),
    "gsm_plus": (PLUS, "The answer is 1200.", ["The answer is 1.2"]),
    "math500": (MATH, r"\boxed{0.5}", [r"\boxed{2}", r"0.5 or so", r"\boxed{0.5} \boxed{1}"]),
    "aime24": ({"id": 1, "problem": "p", "solution": "s", "answer": "033", "url": "u",
            "year": "2024"}, "The answer is 33.", ["33, 34"]),
    "aime25": ({"problem": "p", "answer": "70", "id": "0"}, r"\boxed{70}", [r"\boxed{7}"]),
    "amc": ({"id": 0, "problem": "p", "answer": 142.0, "url": "u"}, "The answer is 142.", ["The answer is 1420."]),
    "arc_easy": (ARC, "The answer is B.", ["The answer is A.", "The answer is 2."]),
    "arc_challenge": (ARC, "q", ["The answer is A or B."]),
    "commonsense_qa": (CSQA, "(E)", ["The answer is F."]),
    "mmlu": (MMLU, "**D**", ["C"]),
    "mmlu_pro": (PRO, "The answer is (I).", ["I think it is J"]),
    "gpqa_diamond": (GPQA, "The answer is yes.", ["The answer is a."]),
    "countdown": ({"target": 24,
            "nums": [4, 6]}, "The answer is 6 * 4 = 24", ["The answer is 4 + 6", "24", "The answer is 4 * 4 + 8"]),
    "game24": ({"Rank": 1, "Puzzles": "1 1 4 6", "Solved rate": "99%"}, "The answer is (1 + 1 - 1) * 24", []),
    "mr_gsm8k": (VERDICT, "The answer is step 2.", ["The answer is correct.", "The answer is step 1."]),
}  # fmt: skip


class Tokens:
    """Only its presence matters: a benchmark is not tokenized before it is asked."""


def open_file(name, rows, tmp_path, *words, file="rows.jsonl"):
    path = data_helpers.write_jsonl(tmp_path / file, rows)
    return open_exam(f"{name}={path}", cfg.parse_words(cfg.Task, words), None, Tokens())


def grade(exam, item, completion, prompt=""):
    sample = Sample(prompt, completion, item.gold, 1, 9, False)
    return exam.reward.function(item.graded(sample), **exam.reward.options)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub_is_asked_and_graded(name, tmp_path):
    row, right, wrong = ROWS[name]
    exam = open_file(name, [row, {"other": 1}], tmp_path)
    (item,) = exam.items
    assert sum(exam.dropped.values()) == 1 and exam.name == name
    assert grade(exam, item, right) == (0.0 if name == "game24" else 1.0)
    for text in [*wrong, "", "I do not know.", f"<think>{right}</think>I do not know.", f"<think>{right}"]:
        assert grade(exam, item, text) == 0.0, text
    assert grade(exam, item, right, "q <think>") == 0.0  # a thought that the template opened and nobody closed


def test_every_benchmark_is_tested():
    assert set(ROWS) == {task.name for task in TASKS.values() if task.generate is None}


def test_choices_are_shown_with_their_letters(tmp_path):
    (item,) = open_file("arc_easy", [ARC], tmp_path).items
    assert item.example.user.startswith("Which?\nA. p\nB. q\nC. r\n\nThink step by step.")
    (item,) = open_file("arc_easy", [ARC], tmp_path, "protocol=direct").items
    assert "Think" not in item.example.user and "alone" in item.example.user


def test_the_right_choice_of_gpqa_is_not_always_the_first(tmp_path):
    rows = [GPQA | {"Question": f"Which {i}?"} for i in range(40)]
    golds = [item.gold for item in open_file("gpqa_diamond", rows, tmp_path).items]
    assert golds == [item.gold for item in open_file("gpqa_diamond", rows, tmp_path).items]
    assert all(golds.count(letter) >= 3 for letter in "ABCD")


def test_rows_without_an_answer_are_counted(tmp_path):
    rows = [PLUS, PLUS | {"answer": "None"}, CSQA | {"answerKey": ""}, {"question": "q", "answer": ""}]
    exam = open_file("gsm_plus", rows, tmp_path)
    assert exam.dropped == {"a question without an answer (critical thinking)": 1, "no answer": 2}


def test_examples_are_shown_from_the_split_that_has_them(tmp_path):
    """Two-shot chain of thought: worked solutions without the calculator's notes, as earlier turns."""
    for split, first in (("train", 10), ("test", 0)):
        (tmp_path / "gsm" / "main").mkdir(parents=True, exist_ok=True)
        rows = [GSM | {"question": f"q{first + i}"} for i in range(4)]
        data_helpers.write_jsonl(tmp_path / "gsm" / "main" / f"{split}.jsonl", rows)
    (tmp_path / "gsm" / "socratic").mkdir()
    data_helpers.write_jsonl(tmp_path / "gsm" / "socratic" / "test.jsonl", [GSM | {"question": "socratic"}])
    words = ["shots=2", "problems=2", "first=1"]
    exam = open_exam(f"gsm8k={tmp_path / 'gsm'}", cfg.parse_words(cfg.Task, words), None, Tokens())
    assert [item.question for item in exam.items] == ["q1", "q2"]
    history = exam.items[0].example.history
    assert [role for role, _ in history] == ["user", "assistant"] * 2
    assert history[0][1].startswith("q10\n\nThink") and history[2][1].startswith("q11")
    assert history[1][1] == "He has 6 * 7 = 42.\nThe answer is 42."
    exam = open_exam(f"gsm8k={tmp_path / 'gsm'}", cfg.parse_words(cfg.Task, [*words, "protocol=direct"]), None, Tokens())
    assert exam.items[0].example.history[1][1] == "The answer is 42."


def test_examples_are_of_the_problem_s_own_subject_and_never_itself(tmp_path):
    shots = [MMLU | {"question": f"{s} {i}", "subject": s} for s in ("law", "art") for i in range(3)]
    asked = load(TASKS["mmlu"], data_helpers.write_jsonl(tmp_path / "a.jsonl", [shots[3], shots[1]]), None, 0, 9).problems
    found = load_shots(TASKS["mmlu"], data_helpers.write_jsonl(tmp_path / "b.jsonl", shots), asked, 2)
    assert [[shot.question for shot in shown] for shown in found] == [["art 1", "art 2"], ["law 0", "law 2"]]


def test_a_csv_of_the_hub_is_read(tmp_path):
    (tmp_path / "gpqa_main.csv").write_text("Question\nother\n")
    lines = ["Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Subdomain", '"a, b?",yes,p,q,r,s']
    (tmp_path / "gpqa_diamond.csv").write_text("\n".join(lines) + "\n")
    exam = open_exam(f"gpqa_diamond={tmp_path}", cfg.parse_words(cfg.Task, []), None, Tokens())
    assert [item.question for item in exam.items] == ["a, b?"]


def test_sorting_problems_are_always_the_same():
    one, two = (open_exam("sort8_mixed", cfg.parse_words(cfg.Task, ["problems=5"]), None, Tokens()) for _ in range(2))
    assert [item.question for item in one.items] == [item.question for item in two.items]
    item = one.items[0]
    numbers = json.loads(re.search(r"\[.*\]", item.question)[0])
    assert len(numbers) == 8 and min(numbers) < 0
    assert grade(one, item, f"The answer is {sorted(numbers)}.") == 1.0
    assert grade(one, item, f"The answer is {sorted(numbers)[::-1]}.") == 0.0
    assert grade(one, item, f"The answer is {sorted(set(numbers))[:-1]}.") == 0.0


@pytest.mark.parametrize(
    ("word", "words", "message"),
    [
        ("gsm8k", [], "a local copy of it is --task gsm8k=PATH"),
        ("gsm8k=/nowhere", [], "no such file or directory; it is a local copy of openai/gsm8k:main"),
        ("gsm8k={file}", [], "no usable problem in {file} (no answer: 1); its rows are those of openai/gsm8k"),
        ("gsm8k={file}", ["first=9"], "no usable problem"), ("sort8={file}", [], "writes its own problems"),
        ("aime24={dir}", ["shots=1", "split=train"], "no usable problem"), ("gsm9k", [], "did you mean gsm8k"),
        ("embedded:arithmetic", ["shots=2"], "shots= belongs to a benchmark"),
        ("embedded:arithmetic", ["protocol=cot"], "protocol= belongs to a benchmark"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said(word, words, message, tmp_path):
    (tmp_path / "d").mkdir()
    file = data_helpers.write_jsonl(tmp_path / "d" / "x.jsonl", [{"question": "q"}])
    place = {"file": str(file), "dir": str(tmp_path / "d")}
    with pytest.raises(UserError, match=re.escape(message.format(**place))):
        open_exam(word.format(**place), cfg.parse_words(cfg.Task, words), scripted.Plain(), Tokens())


def test_one_file_shows_no_examples_of_itself(tmp_path):
    with pytest.raises(UserError, match="give rows to show: shots_from=FILE"):
        open_file("gsm8k", [GSM] * 3, tmp_path, "shots=1")
    shown = data_helpers.write_jsonl(tmp_path / "shown.jsonl", [GSM | {"question": "shown"}])
    (item,) = open_file("gsm8k", [GSM], tmp_path, "shots=1", f"shots_from={shown}").items
    assert item.example.history[0][1].startswith("shown")
    with pytest.raises(UserError, match="shots=2, but there are 1 examples"):
        open_file("gsm8k", [GSM], tmp_path, "shots=2", f"shots_from={shown}")
    shown = data_helpers.write_jsonl(tmp_path / "arc.jsonl", [ARC | {"question": "other"}])
    with pytest.raises(UserError, match="worked solutions, which these rows lack"):
        open_file("arc_easy", [ARC], tmp_path, "shots=1", f"shots_from={shown}")


def test_a_grader_of_one_s_own_sees_the_whole_turn(tmp_path):
    exam = open_file("gsm8k", [GSM], tmp_path, "grader=format")
    assert exam.reward == rewards.get("format")
    assert grade(exam, exam.items[0], "<think>a</think>b") == 1.0


@pytest.mark.parametrize("name", ["embedded:arithmetic", "reasoning-gym:basic_arithmetic"])
def test_a_source_is_asked_as_it_is_and_graded_by_its_own_reward(name):
    tokenizer = tokenizers.load("embedded")
    chat = chats.resolve(tokenizer)
    plain, thought = (open_exam(name, cfg.parse_words(cfg.Task, ["problems=3"]), chat, tokenizer, p) for p in (None, "cot"))
    assert plain.reward.name == ("reasoning_gym" if "gym" in name else "accuracy") and len(plain.items) == 3
    item = plain.items[0]
    said = (f"<think>x</think>{text}" for text in (item.gold, "-12345"))
    right, wrong = (Sample("", text, item.gold, 1, 9, False, item.example.row) for text in said)
    for sample, grade in ((right, 1.0), (wrong, 0.0)):
        assert (plain.reward.function(item.graded(sample), **plain.reward.options) >= 1.0) is (grade == 1.0)
    assert item.answer(right) == item.gold and item.answer(wrong) == "-12345"
    assert item.example.user == item.question
    assert thought.items[0].example.user.startswith(f"{item.question}\n\nThink step by step")
    later = open_exam(name, cfg.parse_words(cfg.Task, ["problems=2", "first=1"]), chat, tokenizer)
    assert [i.digest for i in later.items] == [i.digest for i in plain.items[1:]]
