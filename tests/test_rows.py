"""Other people's rows: whatever a row holds, it is trained as it means or counted by a reason with its number."""

import functools
import json
import os

import data_helpers as helpers
import pytest
from rich.console import Console

from jaxreason.data import chat as chats
from jaxreason.data import json_rows
from jaxreason.data.example import Example, Reject, split_thought
from jaxreason.data.pipeline import prepare
from jaxreason.data.prompts import load_prompts
from jaxreason.data.schema import detect, format_of, parse
from jaxreason.data.tally import Tally
from jaxreason.errors import UserError


@pytest.fixture
def config(tmp_path):
    return functools.partial(helpers.data_config, tmp_path)


def sft(config, tokenizer=None):
    return prepare(config, tokenizer or helpers.llama(), 0, progress=False)


def texts(prepared):
    return [helpers.llama().decode(prepared.train._store.example(int(i))) for i in prepared.train.index]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


# ---- where the thought is

THOUGHT = Example("q", "a", "t")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *[({"messages": [user("q"), assistant("a", **{field: " t\n"})]}, THOUGHT)
          for field in ("reasoning_content", "reasoning", "thinking")],
        ({"messages": [user("q"), assistant("<think>\nt\n</think>\n\na", reasoning="t")]}, THOUGHT),  # said twice, the same
        ({"messages": [user("q"), assistant("a", reasoning="t", thinking="t")]}, THOUGHT),
        ({"messages": [user("q"), assistant("<think>t</think>a", reasoning=None, thinking=" ")]}, THOUGHT),
        ({"messages": [user("q"), assistant("a", reasoning_content=float("nan"))]}, Example("q", "a")),  # as pandas writes it
        ({"prompt": [user("q")], "completion": [assistant("a", thinking="t")]}, THOUGHT),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "reasoning": "t"}]}, THOUGHT),
        (  # an earlier turn's thought is left out, wherever it is
            {"messages": [user("q"), assistant("a", reasoning="t"), user("r"), assistant("b")]},
            Example("r", "b", history=(("user", "q"), ("assistant", "a"))),
        ),
        # TRL's prompts for GRPO
        ({"prompt": [user("q")], "answer": "4"}, Example("q", "4", gold="4")),
        ({"prompt": [{"role": "system", "content": "s"}, user("q")], "answer": "4"}, Example("q", "4", None, "s", "4")),
        ({"prompt": [user("q"), assistant("a"), user("r")], "answer": "t #### 4"},
         Example("r", "t #### 4", gold="4", history=(("user", "q"), ("assistant", "a")))),
        # an empty system turn is one, and an empty column is none
        ({"messages": [{"role": "system", "content": " "}, user("q"), assistant("a")]}, Example("q", "a", system="")),
        ({"system": "", "messages": [user("q"), assistant("a")]}, Example("q", "a")),
        ({"system": "s", "messages": [{"role": "system", "content": ""}, user("q")]}, Example("q", system="s")),
        ({"user": "q", "think": None, "answer": "<think>t</think>a"}, THOUGHT),
        # tags in an answer without a thought are text
        ({"messages": [user("q"), assistant("say <think> or </think>")]}, Example("q", "say <think> or </think>")),
    ],
)  # fmt: skip
def test_the_thought_is_found_where_it_is(row, expected):
    assert parse(row, detect(row), False) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("q"), assistant("<think>u</think>a", reasoning_content="t")]},
         "reasoning_content is another thought than the one in tags"),
        ({"messages": [user("q"), assistant("a", reasoning="t", thinking="u")]}, "reasoning and thinking are different thoughts"),
        ({"messages": [user("q"), assistant("a", reasoning=["t"])]}, "reasoning is not text"),
        ({"messages": [user("q"), assistant("u</think>a", thinking="t")]}, "thinking is another thought than the one in tags"),
        ({"messages": [user("q"), assistant("a", thinking="<think>t</think>")]}, "think tags inside the thought or the answer"),
        ({"system": "s", "messages": [{"role": "system", "content": "x"}, user("q"), assistant("a")]},
         "the column system and the system turn differ"),
        ({"user": "q", "think": "t", "answer": "<think>u</think>a"}, "think tags inside the thought or the answer"),
        ({"prompt": [user("q"), assistant("p")], "answer": "4"}, "last assistant turn follows no user turn"),
        ({"messages": [user("q"), {"role": "r" * 99, "content": "x"}]}, f"role {'r' * 40!r}"),
        ({"nums": [1, float("nan")], "target": 3}, "nums or target is not a number"),
        ({"nums": [1, True], "target": 3}, "nums or target is not a number"),
        ({"question": "q", "answer": float("inf")}, "no answer"),
        ({"text": float("nan")}, "no text"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_rejected_by_name(row, reason):
    with pytest.raises(Reject) as caught:
        parse(row, detect(row), False)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "text",
    [
        "<think>a<think>b</think>c</think>d", "<think>a</think>b</think>c", "<think>a</think>b<think>c</think>d",
        "a</think>b</think>c", "<think>a</think>b <think> c",
        "<|begin_of_thought|>a<|begin_of_thought|>b<|end_of_thought|>c<|end_of_thought|>d",
    ],
)  # fmt: skip
def test_nested_and_orphaned_tags_are_rejected_and_never_rewritten(text):
    with pytest.raises(Reject, match="think tags inside the thought or the answer"):
        split_thought(text)


def test_an_empty_system_turn_is_kept_from_the_config_s(config):
    chat = chats.resolve(helpers.llama(), system_prompt="think first")
    assert "think first" not in chat.render_prompt(Example("q", system=""))
    assert "think first" in chat.render_prompt(Example("q"))


# ---- rows that are none

HOSTILE = {
    "null": ("null", "not an object with columns: a NoneType"),
    "list": ("[1, 2]", "not an object with columns: a list"),
    "surrogate": ('{"question": "half \\ud83d of it", "answer": "1"}', "half of a character (a lone surrogate)"),
    "gold": ('{"question": "q", "answer": "\\udc00"}', "half of a character (a lone surrogate)"),
    "deep": ('{"question": "q", "answer": "1", "x": ' + "[" * 5000 + "]" * 5000 + "}", "more than 64 deep"),
    "as deep": ('{"question": "q", "answer": "1", "x": ' + '{"a":' * 64 + "1" + "}" * 64 + "}", "more than 64 deep"),
    "digits": ('{"question": "q ]}", "answer": ' + "9" * 5000 + "}", "an integer of more than 4300 digits"),
    "long": ('{"question": "' + "x" * 9000 + '", "answer": "1"}', "longer than 0.0078125 MiB"),
    "NaN": ('{"question": "q", "answer": NaN}', "no answer"),
    "Infinity": ('{"question": "q", "answer": -Infinity}', "no answer"),
    "column": ('{"question": "q"}', "columns match no known row format: columns question"),
    "number": ('{"question": 5, "answer": "1"}', "question is not text"),
    "empty": ("{}", "columns match no known row format: columns (none)"),
}


@pytest.mark.parametrize("kind", [name for name in HOSTILE if name != "long"])
@pytest.mark.parametrize("layout", ["jsonl", "array"])
def test_a_row_that_is_none_is_counted_and_the_run_goes_on(layout, kind, tmp_path, config):
    bad, told = HOSTILE[kind]
    good = [json.dumps({"question": f"{i}?", "answer": f"{i}"}) for i in range(3)]
    lines = [good[0], bad, good[1], bad, good[2]]
    path = tmp_path / f"rows.{'jsonl' if layout == 'jsonl' else 'json'}"
    path.write_text("\n".join(lines) if layout == "jsonl" else "[" + ",\n".join(lines) + "]")
    prompts, prepared = load_prompts(config(path), helpers.llama(), 0), sft(config(path))
    assert [prompt.gold for prompt in prompts.prompts] == ["0", "1", "2"]
    assert [prompt.index for prompt in prompts.prompts] == [0, 2, 4]
    assert len(texts(prepared)) == 3 and prepared.train._store.rows.tolist() == [0, 2, 4]
    report = prepared.report.sources[0]
    for dropped, first in (
        (report.dropped, report.first_dropped),
        (prompts.dropped, prompts.report()["sources"][0]["first_dropped"]),
    ):
        assert list(dropped.values()) == [2]
        [(reason, place)] = first.items()
        where = f"{path}, {'line' if layout == 'jsonl' else 'row'} 2"
        assert place.startswith(where) and told in reason + place.removeprefix(where)


@pytest.mark.parametrize("layout", ["jsonl", "array"])
def test_a_row_of_great_length_is_not_kept_in_memory(layout, tmp_path, config, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 8192)
    good = json.dumps({"question": "q", "answer": "1"})
    path = tmp_path / f"rows.{'jsonl' if layout == 'jsonl' else 'json'}"
    lines = [good, HOSTILE["long"][0], good]
    path.write_text("\n".join(lines) if layout == "jsonl" else json.dumps([json.loads(line) for line in lines]))
    report = sft(config(path)).report.sources[0]
    assert report.rows == 3 and report.dropped == {HOSTILE["long"][1]: 1} and report.kept == 2
    exact = json.dumps({"question": "x" * (8192 - len(json.dumps({"question": "", "answer": "1"}))), "answer": "1"})
    path.write_text(f"{exact}\n" if layout == "jsonl" else f"[{exact}]")  # its end of line is one byte too many
    with pytest.raises(UserError, match="longer than"):
        assert sft(config(path)).report.sources[0].dropped == {"longer than max_length": 1}


def test_a_file_of_no_usable_row_is_one_message(tmp_path, config):
    path = tmp_path / "rows.jsonl"
    path.write_text('null\n{"txt": "a"}\n{"txt": "b"}\n')
    message = (
        r"\(columns match no known row format: 2, not an object with columns: 1; first: .*rows\.jsonl, line 2: columns txt\); "
        r"rename the columns or set data\.schema; known formats: openr1: problem, generations"
    )
    with pytest.raises(UserError, match="no trained token in 3 rows, dropped by reason " + message):
        sft(config(path))
    with pytest.raises(UserError, match="no usable prompt in 3 rows " + message):
        load_prompts(config(path), helpers.llama(), 0)
    helpers.write_jsonl(path, [helpers.trace(1)] * 2)
    with pytest.raises(UserError, match=r"no column says whether it is correct: 2;.*keep_only_correct needs one of the col"):
        sft(config(path, keep_only_correct=True))
    with pytest.raises(UserError, match=r"no column level, which data\.keep_columns names: 2; .*line 1: it has messages"):
        load_prompts(config(path, keep_columns=["level"]), helpers.llama(), 0)


def test_reasons_are_bounded():
    tally = Tally()
    for i in range(1000):
        tally.reject(Reject(f"reason {i}"), lambda: "here")
    assert len(tally.rejects) == 101 and tally.dropped["one of many other reasons"] == 900


# ---- several formats

MIXED = [
    helpers.trace(1), {"question": "q", "answer": "4"}, {"prompt": [user("q")], "completion": [assistant("5")]},
    helpers.trace(2), {"odd": 1},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_formats_in_one_file(kind, tmp_path, config):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        helpers.write_jsonl(path, MIXED)
    else:
        import pyarrow as pa
        import pyarrow.parquet

        columns = dict.fromkeys(name for row in MIXED for name in row)
        pa.parquet.write_table(pa.Table.from_pylist([columns | row for row in MIXED]), path)  # the rest of the columns is null
    prepared = sft(config(path))
    report = prepared.report.sources[0]
    # In a table the last row has the column messages, too, with nothing in it.
    messages = 2 if kind == "jsonl" else 3
    assert report.formats == {"messages": messages, "question_answer": 1, "prompt_completion": 1} and report.kept == 4
    assert list(report.dropped) == ["columns match no known row format" if kind == "jsonl" else "messages is empty or not a list"]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(prepared.report.table())
    assert f"(messages {messages}, question_answer 1, prompt_completion 1)" in console.export_text()
    prompts = load_prompts(config(path), helpers.llama(), 0)
    assert [prompt.gold for prompt in prompts.prompts] == ["2", "4", "3"]
    assert prompts.report()["sources"][0]["formats"] == report.formats
    assert format_of({"text": "x"}, "messages") == "messages"  # a named format is every row's


# ---- templates that refuse a row

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
)
GEMMA = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LLAMA2
QWEN3 = (  # takes the thought out of the content, and writes one, if an empty one, into the last turn
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set t = '' %}{% set c = m['content'] %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].strip() %}{% endif %}<|eom_id|><think>\n{{ t }}\n</think>\n\n{{ c }}<|eot_id|>"
    "{% else %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|eom_id|>{% endif %}"
)
REFUSED = {
    "llama2": (LLAMA2, {"messages": [user("a"), user("q"), assistant("4")], "gold": 4}, "roles must alternate user/assistant"),
    "gemma": (
        GEMMA, {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("4")], "gold": 4},
        "System role not supported",
    ),
    "qwen3": (QWEN3, {"messages": [user("q"), assistant("use <think> and </think>")], "gold": 4}, "conversation continues"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_template_refuses_one_row_and_not_the_run(kind, tmp_path, config):
    template, bad, words = REFUSED[kind]
    tokenizer = helpers.llama(template)
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", [helpers.trace(1), bad, helpers.trace(2)])
    report = sft(config(path), tokenizer).report.sources[0]
    assert report.kept == 2 and report.dropped == {"the chat template refuses the row": 1}
    place = report.first_dropped["the chat template refuses the row"]
    assert place.startswith(f"{path}, line 2: ") and words in place
    prompts = load_prompts(config(path), tokenizer, 0)
    assert [prompt.gold for prompt in prompts.prompts] == (["2", "4", "3"] if kind == "qwen3" else ["2", "3"])
    only = helpers.write_jsonl(tmp_path / "only.jsonl", [bad])
    with pytest.raises(UserError, match=rf"the chat template refuses the row: 1; first: .*only\.jsonl, line 1: .*{words}"):
        sft(config(only), tokenizer)
