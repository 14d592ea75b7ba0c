"""Self-Instruct: what is asked, how lists and instances are read, and what a scripted model makes of known seeds."""

import json
import random
import re
from types import SimpleNamespace

import pytest
import scripted

from jaxreason import cli
from jaxreason import config as cfg
from jaxreason.curate import instruct, tasks
from jaxreason.curate.instruct import Draft, InstructJob
from jaxreason.curate.overlap import Contamination
from jaxreason.curate.tasks import Instance, Task
from jaxreason.data import schema
from jaxreason.errors import UserError


@pytest.mark.parametrize(
    "text, found",
    [
        ("9. Sort words.\n10. Add numbers.", ["Sort words.", "Add numbers."]),
        ("9) Sort words.\r\n10) Add.", ["Sort words.", "Add."]),
        ("**9.** Sort words.\n**10**: Add.\n> 11. Sing.", ["Sort words.", "Add.", "Sing."]),
        ("Task 9: Sort.\nTask 10: Add.", ["Sort.", "Add."]),
        ("Sure, here they are:\n9. Sort.\n\nI hope that these help!", ["Sort."]),
        ("9.\nSort these\nwords.\n\n10. Add.", ["Sort these words.", "Add."]),  # an item may begin below its number
        ("9. Sort:\n1. first\n2. second\n10. Add.", ["Sort: 1. first 2. second", "Add."]),  # a list within an item
        ("9. Halve it.\n9.5 apples are left.\n11. Add.", ["Halve it. 9.5 apples are left.", "Add."]),
        ("9. Name what happened in\n1984. It was a year.\n10. Add.", ["Name what happened in 1984. It was a year.", "Add."]),
        ("9. Sort.\n10.Add\n11. Sing.", ["Sort. 10.Add", "Sing."]),
        ("9. Sort.\n17. of May.", ["Sort. 17. of May."]),  # eight are asked for: 9 to 16
        ("15. Sort.\n16. Add.\n17. Too many.\n18. More.", ["Sort.", "Add."]),
        ("9. \n10. ", ["", ""]),
        ("9. a 10. b", ["a 10. b"]),
        ("no list", []),
        ("", []),
        ("1. Sort.\n2. Add.", []),
        ("9999999. Sort.", []),
        ("٩. Sort.", []),  # digits of another script
    ],
)
def test_numbered_lists(text, found):
    assert tasks.numbered(text, 9, 16)[0] == found


@pytest.mark.parametrize(
    "text, unfinished",
    [("9. Sort", True), ("9. Sort\n\n", False),
     ("9. Sort\n\nThey are", False), ("16. Sort\n17. Ad", False), ("9. Sort\n17. Ad", True),
     ("none", False), ("9. ", True)],
)  # fmt: skip
def test_a_list_says_whether_its_last_item_is_open(text, unfinished):
    assert tasks.numbered(text, 9, 16)[1] is unfinished


def test_a_list_of_any_text_is_read_without_failing_in_no_time():
    draw = random.Random(0)
    for _ in range(300):
        parts = ["9", "10", ". ", ") ", "\n", " ", "*", "Input: ", "Output", ": ", "a", "Example 1"]
        text = "".join(draw.choice(parts) for _ in range(60))
        items, _ = tasks.numbered(text, 9, 16)
        assert len(items) <= 8 and all("\n" not in item for item in items)
        for kind in (True, False):
            assert all(pair.output == pair.output.strip() for pair in tasks.instances(text, kind))
    for text in ("9" + " " * 200_000, "input" + " " * 200_000 + "x", "*" * 200_000, "example #" + "9" * 200_000):
        assert len(tasks.numbered(text, 9, 16)[0]) <= 1 and tasks.instances(text, False) == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("Input: 2+2\nOutput: 4", [("2+2", "4")]),
        ("Example 1\nInput: 2+2\nOutput: 4\n\nExample 2\nInput: 3\nOutput: 3\n", [("2+2", "4"), ("3", "3")]),
        ("**Example 1:**\n**Input:** a\n**Output:** b", [("a", "b")]),
        ("Input 1: a\nb\nOutput 1: c\n\nd\nInput 2: e\nOutput 2: f", [("a\nb", "c\n\nd"), ("e", "f")]),
        ("Input: (none)\nOutput: a poem", [("", "a poem")]),
        ("Output: a\nInput: b\nOutput: c", [("", "a"), ("b", "c")]),  # the first one has no input
        ("Of course!\nOutput: a", [("", "a")]),
        ("Input: a\nInput: b\nOutput: c", [("a", ""), ("b", "c")]),
        ("Input: a", [("a", "")]),
        ("<think>Input: x\nOutput: y</think>Input: a\nOutput: b", [("a", "b")]),
        ("<think>Input: x\nOutput: y", []),
        ("Output of it is 3", []),
        ("", []),
    ],
)
def test_instances_of_ordinary_tasks(text, found):
    assert [(pair.input, pair.output) for pair in tasks.instances(text, False)] == found


@pytest.mark.parametrize(
    "text, found",
    [
        ("Class label: good\nInput: I like it\nClass label: bad\nInput: I do not", [("I like it", "good"), ("I do not", "bad")]),
        ("Class label: good\nI like it.\nVery much.\n\nLabel: bad\nNo.", [("I like it.\nVery much.", "good"), ("No.", "bad")]),
        ("Input: a\nClass label: x\nInput: b\nClass label: y", [("a", "x"), ("b", "y")]),  # the other way round
        ("Label: x\nOutput: y", [("", "x"), ("", "y")]),
        ("Example 1\nClass label: x\nInput: a\nExample 2\nClass label: y\nInput: b", [("a", "x"), ("b", "y")]),
    ],
)
def test_instances_of_classification(text, found):
    assert [(pair.input, pair.output) for pair in tasks.instances(text, True)] == found


@pytest.mark.parametrize(
    "text, said",
    [("Yes", True), ("**No**, since", False), (" yes.", True), ("Nothing", None), ("It is. Yes", None), ("", None),
     ("<think>No</think>Yes", True), ("<think>Yes", None)],
)  # fmt: skip
def test_the_kind_is_the_first_word(text, said):
    assert tasks.kind(text) is said


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Sort these four words", None),
        ("Sort these words", "fewer than 4 words"),
        ("a " * 150, None),
        ("a " * 151, "more than 150 words"),
        ("", "empty"),
        ("1. Sort these four words", "begins with a number of another list"),
        ("100 words are enough here", None),
        ("- sort these four words", "begins with punctuation"),
        ("Übersetze diese vier Wörter", "begins with a letter that is not English"),
        ("Describe the Picture below in words", "names what a model of text cannot do"),
        ("Please go to the shop", "names what a model of text cannot do"),
        ("Profile the filed mapping of drawings", None),  # parts of other words
    ],
)
def test_an_instruction_is_left_out_for_what_it_is(text, reason):
    assert tasks.unfit(text, 4, 150, cfg.Instruct().refused) == reason


def test_unsound_instances_are_counted():
    pairs = [Instance("a", "1"), Instance("a", "1"), Instance("b", ""), Instance("c", "c")]
    pairs += [Instance("d", "so:"), Instance("e", "2")]
    kept, dropped = tasks.sound(pairs)
    assert kept == [Instance("a", "1"), Instance("e", "2")]
    assert dropped == {
        "no output": 1, "the output repeats the input": 1, "ends with a colon, as what is not finished does": 1,
        "the same as another of its instruction": 1,
    }  # fmt: skip
    two_ways = [Instance("a", "1"), Instance("b", "2"), Instance("a", "3")]
    assert tasks.sound(two_ways) == ([], {"of an instruction that answers one input in two ways": 3})
    assert len(tasks.sound([Instance("", "1"), Instance("", "2")])[0]) == 2  # poems differ


def test_seeds_are_the_released_format_and_plain_rows(tmp_path):
    rows = [
        {"id": "seed_task_0", "name": "breakfast", "instruction": "Is it breakfast?", "is_classification": True,
         "instances": [{"input": "eggs", "output": "Yes"}, {"input": "", "output": ""}]},
        {"prompt": "Name three colours", "output": "red, green, blue"},
        {"instruction": "Name three colours"},
        {"text": "no task"},
    ]  # fmt: skip
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tasks.read_seeds(str(path), "train", None, 0) == (
        [
            Task("seed_task_0", "Is it breakfast?", (Instance("eggs", "Yes"),), True),
            Task("seed_1", "Name three colours", (Instance("", "red, green, blue"),)),
        ],
        {"the same instruction or id as an earlier row": 1, "no text in instruction or prompt": 1},
    )
    assert len(tasks.read_seeds(str(path), "train", 1, 0)[0]) == 1
    path.write_text(json.dumps(rows[3]))
    with pytest.raises(UserError, match="no usable task in 1 rows .*no text in instruction or prompt.*it has text"):
        tasks.read_seeds(str(path), "train", None, 0)


# ---- the whole, with a model whose answers are written down

SEEDS = [
    *({"id": f"s{i}", "instruction": f"Count {word} and say their number", "is_classification": False,
       "instances": [{"input": f"{word} {word}", "output": "2"}]} for i, word in enumerate(("apples", "pears", "plums", "figs"))),
    *({"id": f"c{i}", "instruction": f"Decide whether a {word} is meant", "is_classification": True,
       "instances": [{"input": f"the {word}", "output": "yes"}]} for i, word in enumerate(("cat", "dog", "cow", "owl"))),
]  # fmt: skip
LISTS = {
    0: " Write a poem on autumn leaves\n10. Tell if a review pleases\n11. Draw me a cat\n12. Count apples and say their number",
    1: " Write a poem on autumn leaves\n10. Rhyme\n11. Explain how bread is baked at home",
    2: " Translate this sentence to French now\n10. Invent some riddle about the moon",
}
ANSWERS = {
    "Write a poem": "Input: (none)\nOutput: Leaves fall.",
    "Tell if a review": "Class label: kind\nInput: Fine!\nClass label: unkind\nInput: Awful!\nClass label: unkind\nInput: Awful!",
    "Explain how bread": "Input: rye\nOutput: Knead it.\nInput: rye\nOutput: Bake it.",
    "Translate this": "Input: Good day\nOutput: Bonjour\nInput: Yes\nOutput: Ou",
}


class Chat(scripted.Plain):
    def check_reply(self, text):
        pass


class Encoding(scripted.Bytes):
    control = ()

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


class Library:
    """Answers by what is asked, and what was asked; dies after ``most`` answers."""

    def __init__(self, most=10**9, says=None):
        self.lists, self.calls, self.most, self.says, self.jobs = [], [], most, says, []

    def __call__(self, prompt, sample):
        self.calls.append(prompt)
        if len(self.calls) > self.most:
            raise KeyboardInterrupt
        if self.says is not None:
            return self.says
        asked = prompt.rpartition("Task: ")[2]
        if "Go on with" in prompt:
            if prompt not in self.lists:
                self.lists.append(prompt)
            return LISTS[len(self.lists) - 1]
        if "Yes or No" in prompt.rpartition("\n>")[0].rpartition("Is every right answer")[2]:
            return "Yes" if asked.startswith("Tell if") else "No"
        return next((said for start, said in ANSWERS.items() if asked.startswith(start)), "I cannot")


def made(tmp_path, monkeypatch, library, **changes):
    source = SimpleNamespace(path=tmp_path / "runs/x/checkpoints/00000007", kind="checkpoint", digest=lambda: "d" * 64)
    model = scripted.model(library)
    model.sampler.release = lambda: None
    library.jobs = model.sampler.jobs
    opened = SimpleNamespace(source=source, tokenizer=Encoding(), identity={"weights": "d"}, sampler=model.sampler,
                             chat=lambda _: Chat(), model=lambda _: model)  # fmt: skip
    opened.load = lambda: opened
    monkeypatch.setattr(instruct, "open_model", lambda name, options: opened)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
    words = {"instructions": 5, "together": 1, "max_completion_tokens": 120, "shots": 2} | changes
    out = tmp_path / "out"
    report = instruct.instruct(InstructJob("runs/x", str(seeds), out, cfg.Instruct(**words)))
    return report, [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_the_rows_and_counts_of_a_scripted_model(tmp_path, monkeypatch):
    library = Library()
    report, rows = made(tmp_path, monkeypatch, library)
    assert [(row["id"], row["list"], row["input"], row["output"], row["classification"]) for row in rows] == [
        ("made_0", 0, "", "Leaves fall.", False),
        ("made_1", 0, "Fine!", "kind", True),
        ("made_1", 0, "Awful!", "unkind", True),
        ("made_3", 2, "Good day", "Bonjour", False),
        ("made_3", 2, "Yes", "Ou", False),
    ]
    # Lists 0 to 2 hold 4, 3 and 2: a drawing, a seed and a list's own are left out, "Rhyme" is short.
    assert report["lists"] == 3 and report["instructions"] == {
        "proposed": 9, "kept": 5,
        "dropped": {"ROUGE-L with an earlier instruction not below 0.7": 2, "names what a model of text cannot do": 1,
                    "fewer than 4 words": 1},
    }  # fmt: skip
    assert report["kinds"] == {"other": 4, "classification": 1}
    assert report["instances"] == {
        "proposed": 8, "kept": 5,
        "dropped": {"of an instruction that answers one input in two ways": 2, "the same as another of its instruction": 1},
    }  # fmt: skip
    first, translated = rows[0], rows[3]
    assert first["messages"][0] == {"role": "user", "content": "Write a poem on autumn leaves"}
    assert translated["messages"] == [
        {"role": "user", "content": "Translate this sentence to French now\n\nGood day"},
        {"role": "assistant", "content": "Bonjour"},
    ]
    shared = {"weights": "d" * 16, "step": 7, "seed": 0, "temperature": 0.7, "top_p": 0.5}
    assert shared.items() <= first.items() and first["seeds"].endswith("seeds.jsonl") and schema.detect(first) == "messages"
    assert schema.parse(first, "messages", False).answer == "Leaves fall."


def test_lists_show_eight_tasks_of_which_two_are_its_own(tmp_path, monkeypatch):
    library = Library()
    rows = made(tmp_path, monkeypatch, library)[1]
    shown = {row["list"]: row["shown"] for row in rows}
    assert sorted(shown[0]) == sorted(row["id"] for row in SEEDS)  # there is none of its own yet
    assert len(shown[2]) == len(set(shown[2])) == 8 and sum(name.startswith("made_") for name in shown[2]) == 2
    names = {row["id"]: row["instruction"] for row in SEEDS} | {row["id"]: row["instruction"] for row in rows}
    listed = re.findall(r"^[1-8]\. (.*)$", library.lists[0], re.MULTILINE)
    assert listed == [names[name] for name in shown[0]] and library.lists[0].endswith("\n>9.")


def test_kinds_and_instances_are_asked_after_seed_tasks(tmp_path, monkeypatch):
    """Two shots of either kind; labels come first where the model says that it is classification."""
    library = Library()
    made(tmp_path, monkeypatch, library)
    kinds = [call for call in library.calls if call.count("Is every right answer") == 5]
    assert len(kinds) == 5 and all(call.count("\nYes\n") == call.count("\nNo\n") == 2 for call in kinds)
    instances = {call.rpartition("Task: ")[2].split()[0]: call for call in library.calls if call.count("Write up to 5") == 3}
    assert list(instances) == ["Write", "Tell", "Explain", "Translate", "Invent"]
    assert "Class label: yes\nInput: the " in instances["Tell"] and "Output: 2" not in instances["Tell"]
    assert "Output: 2" in instances["Write"] and "Class label" not in instances["Write"]


def test_a_second_run_asks_only_what_the_first_did_not(tmp_path, monkeypatch):
    """The first dies in its second block of instances; what it makes in the end is what one run makes."""
    straight, whole = Library(), tmp_path / "whole"
    whole.mkdir()
    report, rows = made(whole, monkeypatch, straight, slots=1)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, monkeypatch, Library(3 + 4 + 1), slots=1)
    again = Library()
    found, same = made(tmp_path, monkeypatch, again, slots=1)
    assert again.calls == straight.calls[7:] and len(straight.calls) == 3 + 2 * 5
    for one in (*rows, *same):
        one.pop("model"), one.pop("seeds")
    assert same == rows and found["instructions"] == report["instructions"] and found["instances"] == report["instances"]
    file = tmp_path / "out" / "rows.jsonl"
    before = file.stat().st_mtime_ns
    made(tmp_path, monkeypatch, never := Library(0), slots=1)
    assert never.calls == [] and file.stat().st_mtime_ns == before
    other = Library()
    made(tmp_path, monkeypatch, other, slots=1, instance_temperature=0.5)
    assert len(other.calls) == len(straight.calls)


def test_it_ends_with_as_many_as_were_asked_for_or_after_the_last_list(tmp_path, monkeypatch):
    report, rows = made(tmp_path, monkeypatch, Library(), instructions=1)
    assert report["lists"] == 1 and report["instructions"]["dropped"]["more than were asked for"] == 1
    assert {row["id"] for row in rows} == {"made_0"}
    (tmp_path / "more").mkdir()
    report, _ = made(tmp_path / "more", monkeypatch, Library(), proposals=2)
    assert report["lists"] == 2 and report["instructions"]["kept"] == 3


def test_an_instruction_of_exactly_the_limit_is_no_new_one():
    """Of ten words seven are common, 2 · 7 / 20, then six."""
    said = Draft("", "", 0, "a b c d e f g x y z\n3. a b c d e f w x y z", False, 1, None)
    drafts = SimpleNamespace(of=lambda asked, first, what: [said])
    options = cfg.Instruct(proposals=1)
    made, _, counts = instruct.propose([Task("s", "a b c d e f g h i j")], options, Contamination([]), Chat(), drafts)
    assert [one.task.instruction for one in made] == ["a b c d e f w x y z"]
    assert counts.dropped == {"ROUGE-L with an earlier instruction not below 0.7": 1}


OTHER = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "instance_temperature": 0.5, "seed": 1,
    "max_completion_tokens": 99,
    "instructions": 2, "proposals": 1, "together": 2, "seeds_shown": 4, "made_shown": 1, "shots": 1, "instances": 1,
    "rouge_below": 0.1, "min_words": 6, "max_words": 6, "refused": ["bread"], "max_rows": 7, "ngram": 2, "slots": 1,
}  # fmt: skip
# A scripted model has no template, no system prompt and no weights, and a file of seeds no splits; ``against`` is with ngram.
ELSEWHERE = {"template", "system_prompt", "compute_dtype", "attention", "split", "against"}


def test_every_key_is_held_to_something():
    assert set(OTHER) | ELSEWHERE == set(cfg.keys(cfg.Instruct))


@pytest.mark.parametrize("key", OTHER)
def test_every_key_changes_what_is_asked_or_made(key, tmp_path, monkeypatch):
    """The prompts of each call of the sampler with its settings, and the rows."""
    (tmp_path / "eval.jsonl").write_text(json.dumps({"problem": "is baked", "answer": "5"}) + "\n")
    found = []
    for name, changes in (("a", {}), ("b", {key: OTHER[key]})):
        (tmp_path / name).mkdir()
        library = Library()
        words = {"against": [str(tmp_path / "eval.jsonl")], "proposals": 3} | changes
        rows = made(tmp_path / name, monkeypatch, library, **words)[1]
        found.append((library.calls, str(library.jobs), [row["messages"] for row in rows]))
    assert found[0] != found[1]


def test_what_is_cut_off_and_what_an_evaluation_set_holds_is_left_out(tmp_path, monkeypatch):
    cut = len(LISTS[0]) - 5
    report, _ = made(tmp_path, monkeypatch, Library(), proposals=1, max_completion_tokens=cut)
    assert report["instructions"] == {
        "proposed": 4, "kept": 2,
        "dropped": {"names what a model of text cannot do": 1, "not finished within max_completion_tokens": 1},
    }  # fmt: skip
    (tmp_path / "eval.jsonl").write_text(json.dumps({"problem": "a poem on AUTUMN leaves", "answer": "5"}) + "\n")
    report, rows = made(tmp_path, monkeypatch, Library(), against=[str(tmp_path / "eval.jsonl")], ngram=5, proposals=1)
    assert report["instructions"]["dropped"]["shares 5 words in a row with an evaluation set"] == 1
    assert {row["id"] for row in rows} == {"made_0"} and rows[0]["instruction"].startswith("Tell if")


def test_a_model_that_makes_nothing_ends_with_a_message(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no instance was kept \(empty: 4\); see .*report.json; a model that follows"):
        made(tmp_path, monkeypatch, Library(says=""), together=2, proposals=4)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["lists"] == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "s.jsonl", "--samples", "3"], "--samples goes with --source"),
        (["--seeds", "s.jsonl", "min_words=9", "max_words=3"], "max_words=3 is below min_words=9"),
        (["--seeds", "s.jsonl", "min_reward=1"], "min_reward"),
        (["--seeds", "s.jsonl", "--source", "x"], "not allowed with argument"),
        ([], "one of the arguments --source --seeds is required"),
    ],
)
def test_what_a_person_gets_wrong_is_one_message(words, message, capsys, tmp_path):
    try:
        status = cli.build_data(["--model", "runs/none", "--out", str(tmp_path / "o"), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err
