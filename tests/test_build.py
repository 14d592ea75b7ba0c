"""Data from a model's own traces: overlap of texts by hand, what a scripted model draws, and why each trace is left out."""

import json
import random
import re
from types import SimpleNamespace

import pytest
import scripted

from jaxreason import cli
from jaxreason import config as cfg
from jaxreason.curate import rows, traces
from jaxreason.curate.overlap import Contamination, Novelty, common, rouge_l, words
from jaxreason.curate.select import select
from jaxreason.curate.traces import Trace
from jaxreason.data.prompts import Prompt
from jaxreason.errors import UserError
from jaxreason.evaluate.records import Records


class Chat(scripted.Plain):
    def check_reply(self, text):
        pass


def options(**values):
    return cfg.Build(reward=cfg.Reward(workers=0), **values)


def test_rouge_l_by_hand():
    """ "the cat sat on the mat" and "a cat on the red mat" share "cat on the mat": 2 · 4 / (6 + 6)."""
    a, b = words("The cat sat on the mat."), words("a cat on the RED mat")
    assert common(a, b) == 4 and rouge_l(a, b) == pytest.approx(8 / 12)
    assert rouge_l(a, a) == 1.0 and rouge_l(a, ("dog",)) == 0.0 and rouge_l((), a) == 0.0
    assert rouge_l(words("one two three"), words("two")) == pytest.approx(2 * 1 / 4)


def test_the_longest_common_subsequence_is_that_of_the_textbook():
    """A table of all pairs of prefixes is the twin of the bits."""
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([draw.choice("abcd") for _ in range(draw.randrange(90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert common(a, b) == table[-1][-1]


def test_novelty_is_against_every_kept_text():
    kept = Novelty(0.6)
    kept.add("one two three")
    kept.add("the cat sat on the mat")
    assert kept.refuses("a cat on the red mat")  # 2/3
    assert not kept.refuses("a cat on a red mat")  # cat on mat: 1/2


def test_contamination_is_n_words_in_a_row_and_for_short_problems_all_of_them():
    seen = Contamination(["Ann has two red apples and ONE, pear.", "What is 7 - 5?"], n=5)
    assert seen.has("So: has two red  apples and -- none.")  # five words, whatever stands between them
    assert not seen.has("has two red apples or and one pear")
    assert seen.has("unrelated", "I think that two red apples and one are four")
    assert seen.has("what is 7, 5") and not seen.has("what is 7 5 now") and not seen.has("what is 7")
    grams = " ".join(f"w{i}" for i in range(13))
    assert Contamination([grams]).has(f"a {grams} b") and not Contamination([grams]).has(grams.replace("w6", "x"))


SAID = {
    0: "<think>two and two</think>4",
    1: "<think>two and two</think>4",
    2: "<think>it is two and then two more</think>4",
    3: "<think>two and</think>5",
    4: "4",
    5: "<think>" + "so " * 50,
    6: "<think>quatre ou пять да нет</think>4",
    7: "<think>" + "long " * 9 + "</think>4",
}


def prompts(count=2):
    found = [Prompt((), f"q{i}: 2+2\n>", "4", f"q{i}: 2+2", i) for i in range(count)]
    return {traces.problem_of(prompt): prompt for prompt in found}


def drawn(chosen, records=None, reply=lambda prompt, sample: SAID[sample], samples=8, count=2, slots=4):
    way, model = traces.way_of(chosen, samples), scripted.model(reply, slots=slots)
    found, records = prompts(count), records or Records(None, Trace)
    settings = traces.settings_of(way, 0, {})
    traces.draw(found, model, way, records, settings)
    return found, {problem: records.find(settings, problem, samples) for problem in found}, model


CLEAN = Contamination([])


def test_every_trace_is_kept_or_counted_by_its_first_reason():
    """Of each prompt: 3 is wrong, 5 is cut off (and wrong), 4 has no thought, 6 is not English, 7 is long, 1 is 0 again."""
    chosen = options(max_completion_tokens=100, language="en", max_tokens=50)
    found, by_prompt, _ = drawn(chosen)
    selection = select(found, by_prompt, chosen, Chat(), CLEAN)
    assert selection.drawn == 16 and [kept.trace.sample for kept in selection.kept] == [0, 2, 0, 2]
    assert selection.dropped == {
        "reward below 1": 4, "not of the format think": 2, "less than 0.9 of the thought in en": 2,
        "longer than 50 tokens": 2, "the same text as a kept trace of its prompt": 2,
    }  # fmt: skip
    assert selection.drawn == len(selection.kept) + sum(selection.dropped.values())
    assert {kept.pass_rate for kept in selection.kept} == {6 / 8}
    assert by_prompt[next(iter(found))][0].tokens == len(SAID[0]) + 1  # bytes, and the stop token


def test_truncated_traces_are_never_kept():
    chosen = options(max_completion_tokens=len(SAID[0]), min_reward=0.0, format="any")
    found, by_prompt, _ = drawn(chosen, samples=1)
    assert select(found, by_prompt, chosen, Chat(), CLEAN).dropped == {"not finished within max_completion_tokens": 2}


@pytest.mark.parametrize(
    "change, kept, reason",
    [
        ({"per_prompt": 1}, [0], {"more than 1 of a prompt": 2}),
        ({"min_tokens": 30}, [2, 7], {"shorter than 30 tokens": 3}),
        # 0 is "think two and two think 4", 2 "think it is two and then two more think 4": 2 · 6 / (6 + 10).
        ({"max_rouge": 0.7}, [0, 7], {"ROUGE-L with a kept trace above 0.7": 1}),
        ({"max_rouge": 0.76}, [0, 2, 7], {}),
        ({"format": "r1"}, [], {"not of the format r1": 6}),
    ],
)
def test_a_filter_changes_what_it_says(change, kept, reason):
    chosen = options(max_completion_tokens=100, **({"language": "en"} | change))
    found, by_prompt, _ = drawn(chosen, count=1)
    selection = select(found, by_prompt, chosen, Chat(), CLEAN)
    assert [k.trace.sample for k in selection.kept] == kept
    assert reason.items() <= selection.dropped.items() and selection.drawn == len(kept) + sum(selection.dropped.values())


def test_novelty_may_be_against_all_prompts():
    chosen = options(max_completion_tokens=100, max_rouge=0.9, rouge_with="all", language="en")
    found, by_prompt, _ = drawn(chosen)
    selection = select(found, by_prompt, chosen, Chat(), CLEAN)
    assert [(kept.prompt.index, kept.trace.sample) for kept in selection.kept] == [(0, 0), (0, 2), (0, 7)]


def test_the_preferred_of_a_prompt_are_the_shortest_or_by_the_seed():
    said = {i: f"<think>{'so ' * (9 - i)}</think>4" for i in range(8)}
    first = set()
    for seed in range(6):
        chosen = options(max_completion_tokens=100, per_prompt=1, prefer="random", seed=seed)
        found, by_prompt, _ = drawn(chosen, reply=lambda prompt, sample: said[sample], count=1)
        picked = [select(found, by_prompt, chosen, Chat(), CLEAN).kept[0].trace.sample for _ in range(2)]
        assert picked[0] == picked[1]
        first.add(picked[0])
    assert len(first) > 1
    shortest = options(max_completion_tokens=100, per_prompt=2)
    assert [kept.trace.sample for kept in select(found, by_prompt, shortest, Chat(), CLEAN).kept] == [7, 6]


def test_rewards_are_summed_by_weight_and_a_failing_one_is_no_reward(tmp_path):
    (tmp_path / "mine.py").write_text("def fails(sample):\n    if 'sat' in sample.completion: raise ValueError\n    return 0.5\n")
    terms = [cfg.RewardTerm(name="accuracy", weight=2.0), cfg.RewardTerm(name=f"{tmp_path / 'mine.py'}:fails")]
    chosen = cfg.Build(reward=cfg.Reward(workers=0, functions=terms), max_completion_tokens=100, format="any", min_reward=2.5)
    found, by_prompt, _ = drawn(chosen, reply=lambda prompt, sample: ["4", "5", "sat"][sample], samples=3, count=1)
    parts = [(trace.reward, list(trace.rewards.values())) for trace in next(iter(by_prompt.values()))]
    assert parts == [(2.5, [1.0, 0.5]), (0.5, [0.0, 0.5]), (None, [0.0, None])]
    selection = select(found, by_prompt, chosen, Chat(), CLEAN)
    assert selection.dropped == {"reward below 2.5": 1, "no reward: a function failed, or had none": 1}


class Cut(Exception):
    pass


def test_a_second_run_draws_only_what_the_first_did_not(tmp_path):
    """Blocks are of 8 · slots / samples = 4 prompts; the first run dies in its third."""
    calls = []

    def dies(prompt, sample):
        calls.append(prompt)
        if len(calls) > 70:
            raise Cut
        return SAID[sample]

    chosen = options(max_completion_tokens=100)
    _, straight, whole = drawn(chosen, count=12)
    with pytest.raises(Cut):
        drawn(chosen, Records(tmp_path, Trace, traces.FILE), dies, count=12)
    _, resumed, model = drawn(chosen, Records(tmp_path, Trace, traces.FILE), count=12)
    assert resumed == straight and model.sampler.asked == whole.sampler.asked[8:]
    assert [job.first_prompt for job in model.sampler.jobs] == [8]
    more = drawn(chosen, Records(tmp_path, Trace, traces.FILE), count=13)[2]
    assert {re.match("q([0-9]+)", prompt)[1] for prompt in more.sampler.asked} == {"12"}
    warmer = drawn(options(max_completion_tokens=100, temperature=0.9), Records(tmp_path, Trace, traces.FILE), count=1)[2]
    assert len(warmer.sampler.asked) == 1  # of other settings are other traces


def faked(monkeypatch, replies):
    """``open_model`` gives a scripted model with the embedded tokenizer's chat, which answers by the embedded task's rules."""
    opened = []

    def open_model(name, settings):
        made = scripted.model(replies)
        source = SimpleNamespace(path=rows.Path("runs/x/checkpoints/00000007"), kind="checkpoint", digest=lambda: "d" * 64)
        both = SimpleNamespace(
            source=source, tokenizer=Encoding(), identity={"weights": "d"}, sampler=made.sampler, chat=lambda _: Chat(),
            model=lambda _: made,
        )  # fmt: skip
        made.sampler.release = lambda: None
        both.load = lambda: opened.append(made) or both
        return both

    monkeypatch.setattr(rows, "open_model", open_model)
    return opened


class Encoding(scripted.Bytes):
    control = ()

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def source(path):
    lines = [{"problem": f"Add {i} and {i + 1} please", "answer": str(2 * i + 1)} for i in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    return path


def adds(prompt, sample):
    a, b = map(int, re.findall("[0-9]+", prompt))
    return f"<think>{a} and {b}, {'well ' * sample}is it</think>{a + b if sample != 1 else 0}"


def build(tmp_path, *, samples=3, **changes):
    chosen = options(max_completion_tokens=100, per_prompt=1, **changes)
    return rows.build(rows.BuildJob("runs/x", str(source(tmp_path / "p.jsonl")), samples, tmp_path / "out", chosen))


def test_rows_are_read_by_sft_and_say_where_they_come_from(tmp_path, monkeypatch):
    opened = faked(monkeypatch, adds)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"problem": "ADD 2 and 3, please!", "answer": "5"}) + "\n")
    report = build(tmp_path, against=[str(tmp_path / "eval.jsonl")])
    assert (report["prompts"], report["drawn"], report["kept"], report["prompts_kept"]) == (6, 18, 5, 5)
    assert report["rows_dropped"] == {"the same prompt as an earlier row": 1}
    assert report["dropped"] == {
        "reward below 1": 6, "more than 1 of a prompt": 5, "shares 13 words in a row with an evaluation set": 2,
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 3, 4, 5]
    first = lines[0]
    assert first["messages"] == [
        {"role": "user", "content": "Add 0 and 1 please"},
        {"role": "assistant", "content": "<think>0 and 1, is it</think>1"},
    ]
    wanted = {"gold": "1", "step": 7, "weights": "d" * 16, "sample": 0, "seed": 0, "rewards": {"accuracy": 1.0}, "reward": 1.0,
              "split": "train", "pass_rate": 2 / 3, "tokens": len("<think>0 and 1, is it</think>1") + 1}  # fmt: skip
    assert wanted.items() <= first.items() and first["source"].endswith("p.jsonl") and first["model"].endswith("00000007")
    assert len(opened) == 1


def test_a_second_command_draws_nothing_and_leaves_the_same_file_alone(tmp_path, monkeypatch):
    opened = faked(monkeypatch, adds)
    build(tmp_path)
    file = tmp_path / "out" / "rows.jsonl"
    before = file.stat()
    build(tmp_path)
    after = file.stat()
    assert len(opened) == 1 and (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert build(tmp_path, min_tokens=35)["kept"] == 6 and len(opened) == 1  # other filters of the same traces
    assert file.stat().st_ino != before.st_ino
    assert [json.loads(line)["sample"] for line in file.read_text().splitlines()] == [2] * 6
    build(tmp_path, samples=4)
    assert len(opened) == 2


def test_nothing_kept_is_an_error_with_the_commonest_reason(tmp_path, monkeypatch):
    faked(monkeypatch, lambda prompt, sample: "no")
    with pytest.raises(UserError, match="none of 18 traces was kept; 18 of them: reward below 1; see .*report.json"):
        build(tmp_path)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == {"reward below 1": 18}


def test_the_rows_are_detected_as_conversations_with_thoughts():
    trace = Trace("", "", 0, 0, "<think>a</think>4", 1, False, {}, 1.0)
    prompt = Prompt((), "", "4", "q", 0, system="be brief", history=(("user", "hi"), ("assistant", "hello")))
    row = {"messages": rows.messages_of(prompt, trace), "gold": "4", "rewards": {}, "model": "m", "row": 1}
    from jaxreason.data import schema

    assert schema.detect(row) == "messages"
    example = schema.parse(row, "messages", False)
    assert (example.think, example.answer, example.user, example.system, example.gold) == ("a", "4", "q", "be brief", "4")
    assert example.history == prompt.history


@pytest.mark.parametrize(
    "words, message",
    [
        (["min_tokens=9", "max_tokens=3"], "max_tokens=3 is below min_tokens=9"),
        (["max_rogue=0.7"], "did you mean max_rouge"),
        (["temperature=0"], "greedy decoding are all the same"),
    ],
)
def test_what_a_person_gets_wrong_is_one_message(words, message, capsys, tmp_path):
    assert cli.build_data(["--model", "runs/none", "--source", "embedded:arithmetic", "--out", str(tmp_path / "o"), *words]) == 2
    assert message in capsys.readouterr().err


def test_which_rows_are_asked(tmp_path, monkeypatch):
    faked(monkeypatch, adds)
    assert build(tmp_path, max_rows=2)["prompts"] == 2
    with pytest.raises(UserError, match="no usable prompt .*longer than 19 tokens"):
        build(tmp_path, max_prompt_tokens=19)
    with pytest.raises(UserError, match="no usable prompt"):
        build(tmp_path, row_schema="messages")
    with pytest.raises(UserError, match="against=nowhere.jsonl: .*no such file"):
        build(tmp_path, against=["nowhere.jsonl"])


def test_a_reward_reads_the_kept_columns(tmp_path, monkeypatch):
    faked(monkeypatch, adds)
    (tmp_path / "mine.py").write_text("def short(sample):\n    return float(len(sample.row['answer']) == 1)\n")
    term = cfg.RewardTerm(name=f"{tmp_path / 'mine.py'}:short")
    chosen = cfg.Build(
        reward=cfg.Reward(workers=0, functions=[term]), keep_columns=["answer"], max_completion_tokens=100, per_prompt=1
    )
    job = rows.BuildJob("runs/x", str(source(tmp_path / "p.jsonl")), 1, tmp_path / "out", chosen)
    assert rows.build(job)["kept"] == 5  # 1, 3, 5, 7, 9; 11 has two digits
