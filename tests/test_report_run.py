"""The page about a run: made of files alone, true to them, and safe whatever is in them."""

import json
import re
from pathlib import Path

import pytest
from test_compare import EVIL, Page, make_run

from jaxreason import cli
from jaxreason import config as cfg
from jaxreason.report import run as report

WILSON = {0.5: (0.4038, 0.5962), 0.6: (0.5020, 0.6906), 0.61: (0.5120, 0.6998), 0.8: (0.7112, 0.8666),
          0.9: (0.8256, 0.9448)}  # fmt: skip  # of 100 problems


def measured(accuracy: float, problems: int | None) -> dict[str, float]:
    """What a run records; without ``problems`` the accuracy alone, as it once did."""
    if problems is None:
        return {"eval_accuracy": accuracy}
    low, high = WILSON[accuracy]
    return {"eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high, "eval_problems": problems}


def lines(before: float | None, after: float, problems: int | None = 100) -> list[dict]:
    first = [] if before is None else [{"step": 0, **measured(before, problems)}]
    last = {"step": 2, "reward": 0.5, **measured(after, problems)}
    return [*first, {"step": 1, "reward": 0.2, f"mine {EVIL}": 1.0}, last]


def sample(step: int, group: int, reward: float | None, tokens: int, text: str = "") -> dict:
    return {"step": step, "group": group, "prompt": f"prompt {group} {EVIL}", "gold": f"gold {EVIL}", "tokens": tokens,
            "completion": f"completion {text} {EVIL} \ud800", "truncated": tokens == 9, "advantage": -0.5, "reward": reward,
            "rewards": {f"part {EVIL}": reward}}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "problems", "said"),
    [
        # 20 − √(8.88² + 9.06²) = 7.31 and 20 + √(6.66² + 9.80²) = 31.85 points.
        (0.6, 0.8, 100, "Accuracy 60.0 → 80.0 % (71.1–86.7) on 100 held-out problems: +20.0 points (+7.3 to +31.8)."),
        (0.8, 0.6, 100, "-20.0 points (-31.8 to -7.3). Training made it worse."),
        (0.6, 0.61, 100, "cannot tell that from no change."),
        (0.6, 0.6, 100, "cannot tell that from no change."),
        (0.6, 0.8, None, "+20.0 points (unknown how sure)."),
        (None, 0.8, 100, "Accuracy 80.0 % (71.1–86.7) on 100 held-out problems; it was not measured before training."),
    ],
)
def test_the_headline_claims_no_more_than_the_problems_allow(tmp_path, before, after, problems, said):
    run = report.read_run(make_run(tmp_path, "a", 0, lines(before, after, problems)))
    found = report.headline(run, "a")
    assert found.startswith("a: 2 steps in 2.0 min. ") and found.endswith(said)
    # A mark of a change is there only where the interval leaves 0 out.
    assert ("worse" in found) == (said.endswith("worse.")) and ("cannot tell" in found) == ("cannot" in said)


def test_a_run_that_was_not_evaluated_claims_nothing(tmp_path):
    run = report.read_run(make_run(tmp_path, "a", 0, [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.4}], finished=False))
    assert report.headline(run, "a") == (
        "a: 2 steps, not finished. Reward 0.100 → 0.400. No held-out problem was graded, so what it learned to answer is not "
        "known (eval.problems)."
    )


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A run with hostile text wherever text can come from."""
    samples = [sample(1, 0, 0.0, 3, "first")]
    samples += [sample(2, group, reward, tokens, f"g{group}") for group in range(14)
                for reward, tokens in ((0.0, 2), (1.0, 9), (None, 5))]  # fmt: skip
    path = make_run(tmp_path, "a", 0, lines(0.5, 0.6), f"data.system_prompt=\"{EVIL}\"", samples=samples)
    (path / "data_report.json").write_text(json.dumps({"sources": [{"source": EVIL, "dropped": {EVIL: 3}, "rows": 40000}]}))
    record = {"command": EVIL, "commit": EVIL, "hardware": EVIL, "versions": {EVIL: EVIL}}
    (path / "origin.json").write_text(json.dumps([record]))
    return path


def test_no_text_of_a_run_becomes_markup(hostile):
    page = Page(report.write_run_report(hostile).read_text())
    names = [tag for tag, _ in page.tags]
    assert "img" not in names and names.count("script") == 1
    for _, attributes in page.tags:
        assert not {"src", "href", "style", "onload", "onerror", "onclick"} & attributes.keys()
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_the_page_holds_what_the_files_hold(hostile):
    assert cli.report([str(hostile)]) == 0
    text = (hostile / "report.html").read_text()
    page = Page(text)
    evaluated = [["0", "0.500", "0.404", "0.596", "100"], ["2", "0.600", "0.502", "0.691", "100"]]
    assert [row for row in page.rows if row[0] in ("0", "2")] == evaluated
    assert ["sources 1, rows", "40,000"] in page.rows and ["sources 1, dropped", f"{EVIL} 3"] in page.rows
    assert ["command", EVIL] in page.rows and ["time", ""] in page.rows
    # Step 1 and the last step; twelve of its fourteen problems, the best completion first, one without a reward last.
    assert re.findall("Completions of step ([0-9]+)", text) == ["1", "2"] and "2 more problems are in samples.jsonl" in text
    of_first = [t for t in page.texts["pre"] if t.startswith("completion g0")]
    assert len(of_first) == 3 and text.count("<details><summary>prompt") == 13 and "rewards 0 1 –" in text
    tokens = [int(n) for n in re.findall(r"advantage -0\.500; ([0-9]+) tokens", text)]
    assert tokens[:4] == [3, 9, 2, 5] and text.count("9 tokens, truncated") == 12


def test_tokens_are_shaded_by_their_probability(tmp_path):
    """ln 0.9 = -0.105, ln 0.6 = -0.511, ln 0.3 = -1.204, ln 0.1 = -2.303: a token on either side of each."""
    logp = [-0.1, -0.11, -0.5, -0.52, -1.2, -1.21, -2.3, -2.31, float("nan")]
    pieces = [f"{chr(97 + i)}{EVIL}" for i in range(9)]
    entropy = [0.1, 0.2, 0.6, 1.1, 2.1, 0, 0, 0, None]
    gap = [1e-3, -2e-3, 0.02, -0.06, 0.3, 0, 0, 0, None]
    shaded = sample(1, 0, 0.0, 3) | {"pieces": pieces, "logp": logp, "entropy": entropy, "gap": gap}
    broken = sample(1, 1, 0.0, 3) | {"pieces": pieces, "logp": logp[1:]}
    path = make_run(tmp_path, "a", 0, lines(0.5, 0.6), samples=[shaded, broken])
    page = Page(report.write_run_report(path).read_text())
    spans = [a for tag, a in page.tags if tag == "span" and a.get("title", "").startswith("log-prob")]
    classes = [a["class"] for a in spans]
    assert classes == ["l1 e1 g1", "l1 e2 g2", "l2 e3 g3", "l2 e4 g4", "l3", "l3", "l4"]
    assert spans[0]["title"] == "log-prob -0.110, entropy 0.200, sampler's gap -0.00200"
    radios = [(a["value"], "checked" in a) for tag, a in page.tags if tag == "input" and a["type"] == "radio"]
    assert radios == [("logp", True), ("entropy", False), ("gap", False)]
    assert "img" not in [tag for tag, _ in page.tags]
    # Of the two tokens that are not shaded, the last has no number.
    assert pieces[0] + pieces[8] == page.texts["pre"][0] and sum(text.startswith("completion") for text in page.texts["pre"]) == 1


def test_a_search_is_drawn(tmp_path, capsys):
    """In the order of a walk, each node with what it adds; a file that is none, or that bites its own tail, is refused."""
    def node(number, parent, depth, text, fate="kept", value=0.5):
        return {"id": number, "parent": parent, "depth": depth, "text": text, "value": value, "visit": None, "fate": fate}

    nodes = [node(0, None, 0, "", value=None), node(1, 0, 1, "a\n"), node(2, 0, 1, f"b{EVIL}", "dropped")]
    nodes.append(node(3, 1, 2, "a\nc", "end"))
    whole = {"question": EVIL, "strategy": "tot_bfs", "tokens": 7, "tree": {"nodes": nodes, "answer": 3}}
    (tmp_path / "tree.json").write_text(json.dumps(whole))
    path = make_run(tmp_path, "a", 0, lines(0.5, 0.6))
    assert cli.report([str(path), "--tree", str(tmp_path / "tree.json")]) == 0
    page = Page((path / "report.html").read_text())
    drawn = [(a["class"], text) for a, text in zip((a for tag, a in page.tags if tag == "li"), page.texts["pre"])]
    assert drawn == [("d0 kept", "the start"), ("d1 kept", "a"), ("d2 end", "c"), ("d1 dropped", f"b{EVIL}")]
    assert "img" not in [tag for tag, _ in page.tags]
    known = {"gold": EVIL, "tokens": 7, "details": {"tree": whole["tree"]}}
    answers = [known | {"question": f"q{i}", "correct": i == 0} for i in range(6)]
    answers.insert(1, known | {"question": "no tree", "correct": None, "details": {}})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers) + '{"question": "cut o')
    assert cli.report([str(path), "--tree", str(tmp_path / "answers.jsonl")]) == 0
    text = (path / "report.html").read_text()
    page = Page(text)
    assert sum(tag == "ul" and a.get("class") == "tree" for tag, a in page.tags) == 4 and "2 more trees are in the file" in text
    assert text.count("(right; right is") == 1 and text.count("(wrong; right is") == 3 and "no tree" not in text
    assert "img" not in [tag for tag, _ in page.tags]
    spoilt = {"[]": "not the answers of an evaluation", json.dumps(answers[1]): "no answer has a tree"}
    for content, message in spoilt.items():
        (tmp_path / "answers.jsonl").write_text(content + "\n")
        assert cli.report([str(path), "--tree", str(tmp_path / "answers.jsonl")]) == 2
        assert message in capsys.readouterr().err
    for spoilt in ({"votes": []}, whole | {"tree": {"nodes": [node(1, 0, 1, "a")], "answer": 1}}):
        (tmp_path / "tree.json").write_text(json.dumps(spoilt))
        assert cli.report([str(path), "--tree", str(tmp_path / "tree.json")]) == 2
        assert "no tree of thoughts" in capsys.readouterr().err


def test_accuracy_is_drawn_with_its_interval(tmp_path):
    ends = {"eval_accuracy_low": 0.4, "eval_accuracy_high": 0.7}
    path = make_run(tmp_path, "a", 0, [{"step": 0, "eval_accuracy": 0.5, **ends}, {"step": 2, "eval_accuracy": 0.6, **ends}])
    page = Page(report.write_run_report(path).read_text())
    values = [json.loads(a["data-values"]) for tag, a in page.tags if tag == "g" and "data-values" in a]
    assert [[0, "0.500", "0.400", "0.700"], [2, "0.600", "0.400", "0.700"]] in values


def test_lengths_are_counted(hostile):
    """14 completions each of 2, 5 and 9 tokens in bins of one token."""
    bars = report.lengths(report.Variant("a", [report.read_run(hostile)]), 1)
    assert set(bars.indices) == {1}
    assert bars.labels == ["2", "3", "4", "5", "6", "7", "8", "9"] and bars.values == [14, 0, 0, 14, 0, 0, 0, 14]
    assert "42 completions of step 2; 14 reached the limit" in bars.note


def test_a_second_run_stands_beside_it(tmp_path, hostile, capsys):
    other = make_run(tmp_path / "more", "a", 3, lines(0.5, 0.9), "loss.name=gspo")
    assert cli.report([str(hostile), str(other), "--out", str(tmp_path / "two.html")]) == 0
    page = Page((tmp_path / "two.html").read_text())
    assert ["loss.name", '"grpo"', '"gspo"'] in page.rows and ["run.seed", "0", "3"] in page.rows
    labels = {a["data-label"] for tag, a in page.tags if tag == "g" and "data-label" in a}
    assert labels == {str(hostile), str(other)}  # of one name, so their places tell them apart
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text(cfg.dump(cfg.load("sft")))
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for argv, part in (([str(hostile), str(tmp_path / "sft")], "different algorithms"), ([str(tmp_path)], "no config.yaml"),
                       ([str(hostile), "--out", str(tmp_path / "none" / "x.html")], "give --out FILE")):  # fmt: skip
        assert cli.report(argv) == 2
        assert part in capsys.readouterr().err
