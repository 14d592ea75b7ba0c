"""Exams taken by a scripted model: what is measured, what a second run asks, and how results stand side by side."""

import io
import json
import re
import time
import types

import numpy as np
import pytest
import scripted
from rich.console import Console

from jaxreason.data.example import Example
from jaxreason.errors import UserError
from jaxreason.evaluate import strategies, table
from jaxreason.evaluate.exam import Exam, Item
from jaxreason.evaluate.records import FILE, Answer, Records
from jaxreason.evaluate.run import Way, difference, summed_up, take
from jaxreason.rewards import get
from jaxreason.sampler import Sampling
from jaxreason.terminal import Working


def exam(count, gold=lambda i: str(i)):
    def graded(sample):
        return sample

    def answer(sample):
        return sample.completion if sample.completion.isdigit() else None

    items = [Item(f"{i:016}", f"q{i}", gold(i), Example(f"q{i}"), answer, graded) for i in range(count)]
    return Exam("toy", tuple(items), get("accuracy", symbolic="never"), "as it is", {})


def way(samples=1, temperature=0.0, strategy="direct", limit=4):
    return Way(strategies.get(strategy), Sampling(limit, temperature), samples, workers=0, timeout_s=5.0)


def asks(prompt):
    return int(re.search("q([0-9]+)", prompt)[1])


def half(prompt, sample):
    """Even problems are answered by every sample, odd ones by every other; sample 3 never ends."""
    number = asks(prompt)
    return "2222222" if sample == 3 else str(number if number % 2 == 0 or sample % 2 else 99)


def test_the_measures_of_samples(tmp_path):
    """Problems 0 to 3 of samples 0 to 3. Right: 3 of 4, 1 of 4, 3 of 4 (2222 is not 2), 1 of 4."""
    result = take(exam(4), scripted.model(half), way(4, 0.6), Records(None, Answer), {})
    found = result.metrics
    assert found["accuracy"] == 8 / 16 and found["accuracy_if_finished"] == 8 / 12 and found["truncated_fraction"] == 4 / 16
    # 1 − C(1, 2) / C(4, 2) = 1 of three right; 1 − C(3, 2) / C(4, 2) = 1/2 of one.
    assert found["pass@2"] == pytest.approx((1 + 0.5) / 2) and found["pass@4"] == 1.0
    # 99 twice against the right answer once: the odd problems are lost to the vote, the even ones won.
    assert found["cons@4"] == 0.5
    assert found["format_fraction"] == 12 / 16  # what was cut off is no answer
    # "0" and its stop token are 2 tokens, "99" 3, what is cut off 4.
    assert found["tokens"] == np.mean([2, 2, 2, 4, 3, 2, 3, 4] * 2) and found["prompt_tokens"] == 4 and found["problems"] == 4
    assert found["accuracy_low"] < 0.5 < found["accuracy_high"]


def test_a_problem_that_cannot_be_graded_is_left_out_and_counted():
    result = take(exam(3, lambda i: "" if i == 1 else str(i)), scripted.model(half), way(), Records(None, Answer), {})
    assert result.metrics["problems"] == 2 and result.metrics["ungraded"] == 1 and result.metrics["accuracy"] == 1.0


class Cut(Exception):
    pass


def test_a_second_run_asks_only_what_the_first_did_not(tmp_path):
    """The first is cut off in its second block; its answers are those of a run that was not."""
    whole, calls = scripted.model(half, slots=1), []

    def dies(prompt, sample):
        calls.append(prompt)
        if len(calls) > 40:
            raise Cut
        return half(prompt, sample)

    straight = take(exam(12), whole, way(4, 0.6), Records(None, Answer), {})
    with pytest.raises(Cut):
        take(exam(12), scripted.model(dies, slots=1), way(4, 0.6), Records(tmp_path, Answer), {})
    with open(tmp_path / FILE, "ab") as file:
        file.write(b'{"settings": "of a killed wri')
    again = scripted.model(half, slots=1)
    resumed = take(exam(12), again, way(4, 0.6), Records(tmp_path, Answer), {})
    assert resumed.metrics == straight.metrics
    assert again.sampler.asked == whole.sampler.asked[10:] and [job.first_prompt for job in again.sampler.jobs] == [10]
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert len(lines) == 48 and len({(line["problem"], line["sample"]) for line in lines}) == 48
    done = scripted.model(half, slots=1)
    assert take(exam(12), done, way(4, 0.6), Records(tmp_path, Answer), {}).metrics == straight.metrics and not done.sampler.asked
    more = scripted.model(half, slots=1)
    assert take(exam(14), more, way(4, 0.6), Records(tmp_path, Answer), {}).metrics["problems"] == 14
    assert [asks(prompt) for prompt in more.sampler.asked] == [12, 13]


@pytest.mark.parametrize("change", ["temperature", "limit", "strategy", "model", "seed"])
def test_other_settings_are_kept_apart(change, tmp_path):
    take(exam(2), scripted.model(half), way(2, 0.6), Records(tmp_path, Answer), {"weights": "a"})
    ways = {"temperature": way(2, 0.7), "limit": way(2, 0.6, limit=5)}
    samples = 1 if change == "strategy" else 2
    other = scripted.model(half)
    if change == "seed":
        other = type(other)(other.sampler, other.tokenizer, other.chat, 1, other.slots)
    taken = way(samples, 0.6, "self_consistency@k=2") if change == "strategy" else ways.get(change, way(2, 0.6))
    take(exam(2), other, taken, Records(tmp_path, Answer), {"weights": "b" if change == "model" else "a"})
    assert len(other.sampler.asked) == 2
    assert len((tmp_path / FILE).read_text().splitlines()) == 4 + 2 * samples


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / FILE).write_text('{"settings": "x"}\n')
    with pytest.raises(UserError, match=r"answers.jsonl, line 1: not a graded answer"):
        Records(tmp_path, Answer)


def test_a_line_separator_in_an_answer_does_not_split_its_line(tmp_path):
    take(exam(1), scripted.model(lambda prompt, sample: "\u2028"), way(), Records(tmp_path, Answer), {})
    assert len(Records(tmp_path, Answer)._answers) == 1


def test_a_strategy_s_cost_is_all_that_it_drew(tmp_path):
    taken = take(exam(3), scripted.model(half), way(1, 0.6, "self_consistency@k=3"), Records(tmp_path, Answer), {})
    assert taken.metrics["accuracy"] == 2 / 3  # problem 1 is lost to 99
    assert taken.metrics["tokens"] == np.mean([6, 8, 6])
    line = json.loads((tmp_path / FILE).read_text().splitlines()[1])
    assert line["answer"] == "99" and line["details"] == {"answers": ["99", "1", "99"], "share": 2 / 3}
    with pytest.raises(UserError, match="gives one answer a problem"):
        take(exam(3), scripted.model(half), way(2, 0.6, "self_consistency"), Records(None, Answer), {})


def test_a_search_is_resumed_by_blocks_of_problems(tmp_path):
    straight, first, second = (scripted.model(half) for _ in range(3))
    whole = take(exam(20), straight, way(1, 0.6, "self_consistency@k=3"), Records(None, Answer), {})
    take(exam(16), first, way(1, 0.6, "self_consistency@k=3"), Records(tmp_path, Answer), {})
    resumed = take(exam(20), second, way(1, 0.6, "self_consistency@k=3"), Records(tmp_path, Answer), {})
    assert [asks(prompt) for prompt in second.sampler.asked] == [16, 17, 18, 19]
    assert second.sampler.jobs == straight.sampler.jobs[1:] and resumed.metrics == whole.metrics


def test_results_stand_side_by_side_with_paired_differences():
    """Right on 30 of 40 against 20 of the same 40: the pairs tell them apart, the single intervals overlap."""
    better = take(exam(40), scripted.model(lambda p, s: str(asks(p) if asks(p) % 4 else 99)), way(), Records(None, Answer), {})
    worse = take(exam(40), scripted.model(lambda p, s: str(asks(p) if asks(p) % 4 > 1 else 99)), way(), Records(None, Answer), {})
    found = difference(better, worse)
    assert found.mean == pytest.approx(0.25) and found.excludes_zero and 0.1 < found.low < found.high < 0.41
    assert worse.intervals["accuracy"].high > better.intervals["accuracy"].low
    rows = {row[0]: row[1:] for row in table.rows({"a": worse, "b": better})}
    assert rows["accuracy"][0].startswith("50.0 % [") and rows["difference, points"][0] == ""
    assert rows["difference, points"][1].startswith("25.0 [") and rows["difference, points"][1].endswith("*")
    plain = json.loads(json.dumps(table.plain({"a": worse, "b": better}), allow_nan=False))
    assert plain["b"]["difference"] == pytest.approx(0.25)


def test_a_table_of_searches_is_read_at_80_columns(monkeypatch):
    """A strategy's options stand below each other, and a path in brackets is a path."""
    taken = take(exam(2), scripted.model(half), way(), Records(None, Answer), {})
    shown = Console(width=80, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(table, "console", shown)
    table.show("[b]", {"runs/a[1]": taken, "direct": taken, "tot_bfs@breadth=2@judge_tokens=24": taken})
    text = shown.file.getvalue()
    assert all(word in text for word in ("[b]", " runs/a[1] ", " tot_bfs ", " @breadth=2 ", " @judge_tokens=24 "))


def test_nothing_graded_is_no_number():
    found = summed_up([]).metrics
    assert found["problems"] == 0 and (found["accuracy_low"], found["accuracy_high"]) == (0.0, 1.0)


def test_a_scorer_that_hangs_costs_its_answer_alone(tmp_path):
    (tmp_path / "score.py").write_text(
        "import time\n\ndef longest(sample):\n    time.sleep(60 * (sample.completion == '99'))\n"
        "    return len(sample.completion)\n"
    )
    taken = Way(strategies.get(f"best_of_n@n=2@scorer={tmp_path / 'score.py'}:longest"), Sampling(4, 0.6), 1, 1, 1.0)
    result = take(exam(2), scripted.model(half), taken, Records(None, Answer), {})
    assert result.metrics["accuracy"] == 1.0  # 99 is longer and got no score
    assert result.answers[1].details["scores"] == [None, 1.0]


def hears(capsys: pytest.CaptureFixture, part: str) -> str:
    """What is printed until ``part`` is, for at most ten seconds."""
    said = ""
    for _ in range(1000):
        said += capsys.readouterr().out
        if part in said:
            break
        time.sleep(0.01)
    return said


def test_progress_without_a_terminal(monkeypatch, capsys):
    """A thread speaks, also before anything is done, as where a program compiles."""
    now = [0.0]
    monkeypatch.setattr("jaxreason.terminal.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Working, "_HEARTBEAT", 0.01)
    with Working("toy", 100, "compiling") as show:
        heard = hears(capsys, "toy 0/100")
        show(10, "x")
        now[0] = 12.0
        show(40, "x")
        said = hears(capsys, "40/100")
    assert heard.splitlines()[0] == "toy 0/100 0 s eta unknown compiling"
    # What was done before the first call took none of the time: 30 of 90 in 12 s, and 60 are left for 24 s.
    assert said.splitlines()[-1] == "toy 40/100 12 s eta 24 s x"
