"""lm-evaluation-harness on an exported checkpoint: our model and its own transformers backend say the same."""

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from jaxreason import hf, model
from jaxreason.data.tokenizer import load
from jaxreason.harness import Harness
from jaxreason.model import PRESETS

PAIRS = [
    ("Ben has 5 shells.", " How many?"), ("", "Ann has 7"), ("a " * 90, "b c d"), ("a b ", "c"), ("x", " y"),
    ("Question: 1 + 2 =\nAnswer:", " 3"),
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    place = tmp_path_factory.mktemp("hf") / "model"
    config = PRESETS["embedded-tiny"]
    hf.save(model.init(config, jax.random.key(1)), config, place, dtype="float32", tokenizer=load("embedded"))
    theirs = HFLM(str(place), device="cpu", dtype="float32", batch_size=2)
    return Harness(str(place), batch_size=4), theirs


def limit_to(both, tokens):
    both[0].max_length = both[1]._max_length = tokens


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_log_likelihoods_agree(both):
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", PAIRS)) for lm in both)
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert min(abs(value) for value, _ in ours) > 1


def test_whole_texts_agree_in_windows(both):
    texts = [("one two three " * 40,), ("short",)]
    limit_to(both, 64)
    ours, theirs = (lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for lm in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_greedy_texts_agree_and_end_before_a_stop(both):
    asked = [(context or "q", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}) for context, _ in PAIRS[:3]]
    ours, theirs = (lm.generate_until(instances("generate_until", asked)) for lm in both)
    assert ours == theirs


def test_a_task_is_scored_alike(both, tmp_path):
    """A local multiple-choice task through lm_eval's own evaluator."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [f'{{"q": "{i} + 1 =", "choices": ["{i + 1}", "{i}", "x"], "gold": 0}}' for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "toy.yaml").write_text(
        "task: toy\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(tmp_path / "rows.jsonl") + "\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    limit_to(both, 256)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = [simple_evaluate(lm, tasks=["toy"], task_manager=manager, bootstrap_iters=0, log_samples=False) for lm in both]
    assert found[0]["results"]["toy"]["acc,none"] == found[1]["results"]["toy"]["acc,none"]
