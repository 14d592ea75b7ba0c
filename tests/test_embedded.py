"""The embedded task and its tokenizer: right answers, disjoint splits, one token a word."""

import hashlib
import itertools
import json
import re
from random import Random

import pytest
from transformers import AutoTokenizer, LlamaConfig

from jaxreason.data.chat import resolve
from jaxreason.data.embedded import TASKS, build_tokenizer, examples, parse
from jaxreason.data.embedded import __main__ as command
from jaxreason.data.embedded.arithmetic import Arithmetic, Problem, digit_steps, problems, work
from jaxreason.data.tokenizer import EMBEDDED, load
from jaxreason.errors import UserError

NUMBER = re.compile(r"\d+")
LOSS_WORDS = ("gives away", "loses", "sells", "get off", "leave", "throws away", "spends", "pays")
GAIN_WORDS = ("buys", "finds", "gets", "get on", "join", "makes", "orders", "earns", "saves")


def solve(question: str) -> int:
    """An independent solver: reads the words, never the generator's numbers."""
    if re.search(r"\d [+-] \d", question):
        terms = re.findall(r"([+-]?) ?(\d+)", question)
        return sum(-int(number) if sign == "-" else int(number) for sign, number in terms)
    first, *others = NUMBER.finditer(question)
    total = int(first.group())
    starts = [first.end(), *(match.end() for match in others)]
    for i, match in enumerate(others):
        # The verb stands before the number ("sells 7") or, on board, after it ("7 get off").
        before, after = question[starts[i] : match.start()], question[match.end() :]
        clause = NUMBER.split(after)[0] if "on board" in question else before
        signs = [-1 for word in LOSS_WORDS if word in clause] + [1 for word in GAIN_WORDS if word in clause]
        assert len(signs) == 1, (question, clause)
        total += signs[0] * int(match.group())
    return total


def value(expression: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression))


# --- problems and traces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic?operations=4&bare=0.2"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_gold_solves_the_question_as_it_is_worded(name, split):
    for example in examples(name, split, 1500):
        assert solve(example.user) == int(example.gold), example
        assert example.answer == f"\\boxed{{{example.gold}}}"
        assert 10 <= int(example.gold) <= 199


def test_every_equation_holds_but_the_one_that_is_taken_back():
    slips = checks = 0
    for example in examples("arithmetic?bare=0&careful=1&slips=0.5&checks=0.5&operations=3", "train", 1500):
        wrong = 0
        for match in re.finditer(r"([\d+-]+)=(\d+)(, wait, ([\d+-]+)=(\d+))?", example.think):
            expression, result, taken_back, again, second = match.groups()
            if taken_back:
                assert again == expression and value(expression) == int(second) != int(result)
                wrong += 1
            else:
                assert value(expression) == int(result), (match.group(), example)
        for line in example.think.splitlines():
            head, _, rest = line.partition(": ")
            if head == "check":
                checks += 1
            else:
                assert value(head) == int(rest.split(", ")[-1])
        assert wrong <= 1
        slips += wrong
    assert 650 < slips < 850 and 650 < checks < 850  # binomial(1500, 1/2): 750 ± 5 deviations of 19


def test_digit_steps_by_hand():
    assert digit_steps(37, 1, 48) == (("7+8", "15"), ("3+4+1", "8"))
    assert digit_steps(137, -1, 48) == (("17-8", "9"), ("13-4-1", "8"))
    assert digit_steps(85, -1, 15) == (("5-5", "0"), ("8-1", "7"))


def test_a_whole_trace_by_hand():
    problem = Problem((37, 48, 19), (1, -1))
    trace = work(problem, slip=False, check=True, rng=Random("any"))
    assert trace == "37+48: 7+8=15, 3+4+1=8, 85\n85-19: 15-9=6, 8-1-1=6, 66\ncheck: 66+19=85"


def test_terse_thoughts_give_the_result_and_nothing_else():
    for example in examples("arithmetic?careful=0&careful_bare=0", "train", 200):
        assert NUMBER.findall(example.think) == [example.gold]
        assert example.think.startswith("That ")  # several first words would divide what greedy decoding compares


def test_the_mixture_is_what_its_parameters_say():
    found = {(bare, careful): 0 for bare in (True, False) for careful in (True, False)}
    for example in examples("arithmetic?bare=0.4&careful=0.9&careful_bare=0.3", "train", 4000):
        found["How" not in example.user, "=" in example.think] += 1
    bare, stories = found[True, True] + found[True, False], found[False, True] + found[False, False]
    assert bare / 4000 == pytest.approx(0.4, abs=0.04)  # 5 deviations of sqrt(.24 / 4000)
    assert found[True, True] / bare == pytest.approx(0.3, abs=0.06)
    assert found[False, True] / stories == pytest.approx(0.9, abs=0.04)


def test_operations_is_the_most_of_a_problem():
    counts = {len(p.signs) for p in itertools.islice(problems(Arithmetic(operations=4), "train", Random("x")), 300)}
    assert counts == {2, 3, 4}


# --- splits and determinism ------------------------------------------------------------------------------------------


def expressions(name: str, split: str, n: int, seed: int) -> list[tuple[str, ...]]:
    """Numbers in the question's order with the answer: enough to tell problems apart."""
    return [(*NUMBER.findall(e.user), e.gold) for e in examples(name, split, n, seed)]


def test_no_held_out_problem_is_trained_whatever_seed_and_wording():
    held_out = {p.expression() for p in itertools.islice(problems(Arithmetic(), "eval", Random("a")), 5_000)}
    trained = {p.expression() for p in itertools.islice(problems(Arithmetic(), "train", Random("b")), 5_000)}
    assert len(held_out) == len(trained) == 5_000  # none twice
    assert not held_out & trained
    questions = [e.user for e in examples("arithmetic", "eval", 3000)]
    assert len(set(questions)) == 3000
    assert not set(expressions("arithmetic", "eval", 2000, 0)) & set(expressions("arithmetic", "train", 2000, 1))


def test_the_same_on_every_machine_and_python():
    drawn = examples("arithmetic", "eval", 300, seed=7)
    text = repr([(e.user, e.think, e.answer, e.gold) for e in drawn])
    # Changes only where the task itself is changed: published numbers are then no longer comparable.
    expected = "dd1580c7f023ac5d67ed5f2c005e4f820601f7932259e363c4e4d5794ea421cf"
    assert hashlib.sha256(text.encode()).hexdigest() == expected


def test_more_rows_begin_with_the_fewer_and_seeds_differ():
    assert examples("arithmetic", "train", 50) == examples("arithmetic", "train", 80)[:50]
    assert examples("arithmetic", "train", 50, seed=1) != examples("arithmetic", "train", 50, seed=0)


def test_how_traces_are_written_leaves_the_questions_alone():
    plain, changed = examples("arithmetic", "eval", 100), examples("arithmetic?careful=0.1&slips=0.9", "eval", 100)
    assert [e.user for e in plain] == [e.user for e in changed]
    assert [e.think for e in plain] != [e.think for e in changed]


def test_default_sizes():
    assert len(examples("arithmetic", "eval")) == TASKS["arithmetic"].rows["eval"]


# --- names and parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetics", "did you mean arithmetic"),
        ("arithmetic?carful=0.5", "no parameter carful; did you mean careful"),
        ("arithmetic?operations=two", "operations is 'two'; give a whole number"),
        ("arithmetic?operations=9", "operations is 9; give 2, 3 or 4"),
        ("arithmetic?careful=1.5", "careful is 1.5; it is a fraction"),
        ("arithmetic?careful=nan", "careful is nan; it is a fraction"),
        ("arithmetic?careful", "'careful' is not one key=value"),
        ("arithmetic?careful=0.1&careful=0.2", "not one key=value for each key"),
    ],
)
def test_wrong_names_say_what_is_wrong(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        examples(name, "train", 1)


def test_wrong_split_and_size():
    with pytest.raises(UserError, match="no split 'test'; it has train and eval"):
        examples("arithmetic", "test", 1)
    with pytest.raises(UserError, match="50001 examples of eval asked for; it gives 0 to 50000"):
        examples("arithmetic", "eval", 50_001)


def test_parameters_are_read():
    _, parameters = parse("arithmetic?careful=0.5&operations=3")
    assert parameters == Arithmetic(careful=0.5, operations=3)


# --- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return load("embedded")


def test_the_shipped_files_are_what_the_builder_builds(shipped):
    built = build_tokenizer.build_tokenizer()
    assert shipped.hf.get_vocab() == built.get_vocab()
    for name, content in build_tokenizer.tokenizer_files().items():
        if name != "tokenizer.json":  # its layout belongs to the tokenizers package
            assert (EMBEDDED / name).read_text(encoding="utf-8") == content
    text = "".join("".join(resolve(shipped).render(e)) for e in examples("arithmetic?operations=4", "eval", 200))
    assert shipped.encode(text) == built.encode(text, add_special_tokens=False).ids


def test_size_and_special_tokens(shipped):
    assert shipped.vocab_size % 64 == 0 and shipped.vocab_size <= 512
    assert shipped.hf.eos_token == "<|eot_id|>" and shipped.hf.bos_token == "<|begin_of_text|>"
    assert shipped.hf.pad_token == "<|finetune_right_pad_id|>"
    specials = shipped.encode("".join(build_tokenizer.SPECIAL))
    assert len(specials) == len(build_tokenizer.SPECIAL)
    assert shipped.decode(specials, skip_special_tokens=True) == ""
    ids = shipped.encode("<think>\n7\n</think>\n\n\\boxed{7}<|eot_id|>")
    assert len(ids) == 10
    assert shipped.decode(ids, skip_special_tokens=True) == "<think>\n7\n</think>\n\n\\boxed{7}"


def test_no_word_of_the_task_is_spelled(shipped):
    chat = resolve(shipped)
    spelled = set()
    for example in examples("arithmetic?operations=4&slips=0.5", "train", 3000, seed=5):
        for token in shipped.hf.convert_ids_to_tokens(shipped.encode("".join(chat.render(example)))):
            if len(token) == 1 and token.isalpha() and token not in "ĠĊ":
                spelled.add(token)
    assert spelled <= {"A"}  # "A train", the one word that is a letter


def test_a_digit_is_the_same_token_everywhere(shipped):
    seven = shipped.encode("7")
    assert len(seven) == 1
    for text in ("has 77 apples", "7 + 77", "77-7=70, 7", "\\boxed{7}"):
        assert shipped.encode(text).count(seven[0]) == text.count("7")


@pytest.mark.parametrize(
    "text",
    [
        "Tom has 37 apples.",
        "  two  spaces,\ttabs\r\nand  lines \n\n\n x",
        "naïve façade – 漢字 🙂 e\u0301 \u200d\ufeff",
        "def f(x): return x**2 # 3.14",
        "<think>a</think><|eot_id|>",
        "".join(map(chr, range(256))),
        "",
    ],
)
def test_any_text_survives(shipped, text):
    assert shipped.decode(shipped.encode(text)) == text


def test_random_text_survives(shipped):
    rng = Random("text")
    for _ in range(300):
        text = "".join(chr(rng.choice([*range(32, 127), 10, 0xE9, 0x4E2D, 0x1F600])) for _ in range(60))
        assert shipped.decode(shipped.encode(text)) == text


def test_opens_and_reopens_in_transformers_beside_a_llama_config(tmp_path):
    AutoTokenizer.from_pretrained(str(EMBEDDED)).save_pretrained(str(tmp_path))
    LlamaConfig(vocab_size=384).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    copy = AutoTokenizer.from_pretrained(str(tmp_path))
    question, reply = "Find 10 + 20 - 15.", "<think>\n7\n</think>"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    text = copy.apply_chat_template(messages, tokenize=False)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text == (
        f"<|begin_of_text|>{head.format('user')}{question}<|eot_id|>{head.format('assistant')}{reply}<|eot_id|>"
    )
    assert copy(text, add_special_tokens=False).input_ids == load("embedded").encode(text)
    assert copy.pad_token == "<|finetune_right_pad_id|>"


def test_lengths_fit_the_defaults(shipped):
    chat = resolve(shipped)
    pairs = [chat.render(example) for example in examples("arithmetic", "train", 3000)]
    prompts = [len(shipped.encode(prompt)) for prompt, _ in pairs]
    totals = [n + len(shipped.encode(completion)) for n, (_, completion) in zip(prompts, pairs)]
    assert max(prompts) <= 40 and max(totals) <= 128 and sum(totals) / len(totals) < 80


def test_statistics_are_printed_and_errors_are_short(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["embedded"])
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert "vocabulary 384" in printed and "\\boxed{163}" in printed
    monkeypatch.setattr("sys.argv", ["embedded", "nope"])
    assert command.main() == 2
    failed = capsys.readouterr().err
    assert failed.count("\n") == 1 and "known: arithmetic" in failed
