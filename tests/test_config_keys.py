"""A key that does nothing is a defect: changing each one changes the run, its data or its program.

``ROWS`` of config_keys_sft.py and config_keys_grpo.py change one key and compare an observation; ``RUN`` says what is found
in a real run that has another value of the key than the default. A key without an entry fails.
"""

import functools

import config_keys_grpo
import config_keys_sft
import data_helpers
import pytest

from jaxreason import config as cfg
from jaxreason import serve
from jaxreason.sampler import EngineSampler

KINDS = {"sft": config_keys_sft, "grpo": config_keys_grpo}
CASES = [(kind, key) for kind, rows in KINDS.items() for key in rows.ROWS]
RUNS = [(kind, key) for kind, rows in KINDS.items() for key in rows.RUN]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return config_keys_sft.Places(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def runs(places):
    """Made once each; GRPO's starts from SFT's."""
    sft = functools.cache(lambda: config_keys_sft.real_run(places))
    return {"sft": sft, "grpo": functools.cache(lambda: sft() and config_keys_grpo.real_run(places))}


@functools.cache
def observed(observe, places, words):
    return observe(places, list(words))


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_an_observation(kind):
    known = set(cfg.keys(cfg.ALGORITHMS[kind]))
    covered = {*KINDS[kind].ROWS, *KINDS[kind].RUN}
    assert known - covered == set(), "say in config_keys_*.py what changes with these keys"
    assert covered - known == set(), "these keys are no longer there"


@pytest.mark.parametrize(("kind", "key"), CASES)
def test_changing_a_key_changes_something(kind, key, places):
    observe, value, *context = KINDS[kind].ROWS[key]
    paths = {name: getattr(places, name) for name in ("rows", "other", "marked", "splits", "tokenizer", "start", "peft")}
    paths["mine"] = places.root / "mine.py"
    context = [word.format(**paths) for word in context]
    changed = f"{key}={value}".format(**paths)
    assert observed(observe, places, (*context,)) != observed(observe, places, (*context, changed))


@pytest.mark.parametrize(("kind", "key"), RUNS)
def test_a_run_does_what_its_key_says(kind, key, runs):
    assert KINDS[kind].RUN[key](runs[kind]())


# --- what generate.py and evaluate.py take ---------------------------------------------------------------------------

TASK = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "max_completion_tokens": 5, "slots": 3, "seed": 4,
    "system_prompt": "Think.", "template": "r1_zero", "compute_dtype": "bfloat16", "attention": "reference", "split": "train",
    "first": 2, "problems": 7, "grader": "countdown", "workers": 3, "timeout_s": 4.5,
}  # fmt: skip
BENCHMARK = {"protocol": "direct", "shots": 1, "shots_from": "{shown}"}


def test_every_word_of_evaluate_reaches_the_measurement(runs, monkeypatch, tmp_path):
    """The model's execution, the prompts, the grader and the way of drawing, for every word by itself."""
    assert set(TASK) | set(BENCHMARK) == set(cfg.keys(cfg.Task))
    run, seen = str(runs["sft"]()["folder"]), []
    monkeypatch.setattr(EngineSampler, "__init__", lambda self, model, stops, mesh: seen.append(model.execution))
    monkeypatch.setattr(EngineSampler, "load", lambda self, params, step: None)

    def take(exam, model, way, records, identity):
        asked = [model.chat.render_prompt(item.example) for item in exam.items]
        return [seen.pop(), asked, exam.reward, way.sampling, way.workers, way.timeout_s, model.slots, model.seed]

    monkeypatch.setattr(serve, "take", take)
    monkeypatch.setattr(serve.table, "show", lambda title, results: None)

    def measured(*words, task="embedded:arithmetic"):
        options = cfg.parse_words(cfg.Task, ["problems=9", *words])
        return serve.measure(serve.Contest([run], [task], [None], 1, options, None))[task][run]

    plain = measured()
    assert plain == measured()
    for key, value in TASK.items():
        assert measured(f"{key}={value}") != plain, key
    (tmp_path / "gsm").mkdir()
    for place in ("gsm/train", "gsm/test", "shown"):
        data_helpers.write_jsonl(tmp_path / f"{place}.jsonl", [{"question": place, "answer": "#### 1"}])
    gsm, shown = f"gsm8k={tmp_path / 'gsm'}", tmp_path / "shown.jsonl"
    shows = measured("shots=1", task=gsm)
    assert shows == measured("shots=1", task=gsm) != measured(task=gsm)
    for key in ("protocol", "shots_from"):
        assert measured("shots=1", f"{key}={BENCHMARK[key]}".format(shown=shown), task=gsm) != shows, key
