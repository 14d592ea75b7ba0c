"""Several sources in one run: how often each row comes, what is held out, and what is refused."""

import collections

import data_helpers as helpers
import numpy as np
import pytest
from data_helpers import data_config

from jaxreason.data.mixture import Shares
from jaxreason.data.pipeline import prepare
from jaxreason.data.prompts import PromptStream, load_prompts
from jaxreason.errors import UserError

# Two epochs of a (0 to 7), half of b (100 to 105) and twice c (200 to 202).
AS_OFTEN = {str(i): 2 for i in range(8)} | {str(i): 1 for i in range(100, 106)} | {str(i): 4 for i in range(200, 203)}


def rows(first, count):
    return [{"problem": f"What is {i}?", "solution": f"It is {i}.", "answer": f"{i}"} for i in range(first, first + count)]


@pytest.fixture
def files(tmp_path):
    names = (("a", 0, 8), ("b", 100, 6), ("c", 200, 3))
    return {name: str(helpers.write_jsonl(tmp_path / f"{name}.jsonl", rows(first, count))) for name, first, count in names}


@pytest.fixture
def config(files, tmp_path):
    def make(*mixture, **options):
        parts = [{"source": files[name], "weight": weight} for name, weight in mixture]
        return data_config(tmp_path, files["a"], mixture=parts, **options)

    return make


def test_shares_by_hand():
    """Sources of 4 and 5 rows; 0.4 of 5 are two rows an epoch: 0 1, 2 3, 4 0, 1 2, 3 4 of them in file order."""
    shares = Shares((4, 5), (1.0, 0.4), seed=0, shuffle=False)
    assert [shares.epoch(e).tolist() for e in range(3)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7], [0, 1, 2, 3, 8, 4]]
    assert shares.counts == (4, 2) and len(shares) == 6
    twice = Shares((2, 3), (1.0, 2.0), seed=0, shuffle=False)
    assert twice.epoch(0).tolist() == twice.epoch(1).tolist() == [0, 1, 2, 3, 4, 2, 3, 4]


def test_shuffled_shares_use_all_rows_equally_often():
    shares = Shares((7, 10), (1.0, 0.3), seed=3, shuffle=True)
    seen = collections.Counter(np.concatenate([shares.epoch(e) for e in range(10)]).tolist())
    assert seen == {**dict.fromkeys(range(7), 10), **dict.fromkeys(range(7, 17), 3)}
    again, other = Shares((7, 10), (1.0, 0.3), 3, True), Shares((7, 10), (1.0, 0.3), 4, True)
    assert [again.epoch(e).tolist() for e in range(4)] == [shares.epoch(e).tolist() for e in range(4)]
    assert any(other.epoch(e).tolist() != shares.epoch(e).tolist() for e in range(4))


def questions(prepared, epochs):
    """How often each question stands in the rows of the first epochs."""
    train, tokenizer, found = prepared.train, helpers.llama(), collections.Counter()
    for row in range(sum(train.rows_per_epoch(e) for e in range(epochs))):
        for example in train.examples(row):
            text = tokenizer.decode(train._store.example(int(train.index[example])))
            found[text.split("What is ")[1].split("?")[0]] += 1
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_sft_trains_each_source_as_often_as_its_weight(config, packing):
    prepared = prepare(config(("b", 0.5), ("c", 2), packing=packing), helpers.llama(), 0, progress=False)
    assert questions(prepared, epochs=2) == AS_OFTEN
    assert prepared.report.train.examples == 8 + 3 + 6
    assert [source.kept for source in prepared.report.sources] == [8, 6, 3]
    plain = prepare(config(packing=packing), helpers.llama(), 0, progress=False)
    assert plain.report.train.examples == 8 and plain.fingerprint != prepared.fingerprint


def test_held_out_rows_are_of_no_epoch(config):
    prepared = prepare(config(("b", 0.5), ("c", 3), eval_rows=6), helpers.llama(), 0, progress=False)
    text = lambda example: helpers.llama().decode(prepared.train._store.example(int(example)))  # noqa: E731
    held_out = {text(example).split("What is ")[1].split("?")[0] for example in prepared.eval.index}
    assert len(held_out) == 6 and {int(q) // 100 for q in held_out} >= {0, 1}  # of several sources
    trained = questions(prepared, epochs=4)
    assert not held_out & set(trained)
    assert set(trained) | held_out == {*map(str, range(8)), *map(str, range(100, 106)), *map(str, range(200, 203))}


def test_grpo_draws_each_source_as_often_as_its_weight(config):
    found = load_prompts(config(("b", 0.5), ("c", 2)), helpers.llama(), 0)
    for shuffle in (True, False):
        stream = PromptStream(found, 5, shuffle)
        golds = collections.Counter(stream.at(cursor).gold for cursor in range(2 * (8 + 3 + 6)))
        assert golds == AS_OFTEN
    assert [source["kept"] for source in found.report()["sources"]] == [8, 6, 3]
    assert found.fingerprint != load_prompts(config(("b", 0.5), ("c", 1)), helpers.llama(), 0).fingerprint
    of_b = found.sources[1]
    assert of_b.table(True)[0] == ("problems", f"of {of_b.source}, weight 0.5: 6 of 6 rows (problem_answer)")


def test_what_is_refused(config, files):
    for data, message in (
        (config(("b", 1), ("b", 2)), r"data\.mixture: .*b\.jsonl is in .*name it once"),
        (config(("a", 1)), r"data\.mixture: .*a\.jsonl is in"),
        (config(("b", 1), eval_source=files["b"]), r"data\.eval_source .*b\.jsonl is what is trained"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(data, helpers.llama(), 0, progress=False)
    with pytest.raises(UserError, match=r"data\.mixture: .*b\.jsonl is in"):
        load_prompts(config(("b", 1), ("b", 1)), helpers.llama(), 0)
