"""Tasks of reasoning-gym as a source of problems, their own grading, and columns that reach a reward function."""

import json

import pytest
from reasoning_gym import create_dataset

from jaxreason import config as cfg
from jaxreason import rewards
from jaxreason.data import gym
from jaxreason.data.prompts import load_prompts
from jaxreason.data.sources import open_source
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError
from jaxreason.rewards import Sample
from jaxreason.rewards.worker import call

NAME = "chain_sum?min_terms=2&max_terms=3"


def test_splits_share_no_question_and_follow_the_package():
    train, held_out = gym.examples(NAME, "train", 120, 0), gym.examples(NAME, "eval", 40, 7)
    assert len(train) == 120 and len(held_out) == 40
    assert not {e.user for e in train} & {e.user for e in held_out}
    task = create_dataset("chain_sum", size=10_000, seed=0, min_terms=2, max_terms=3)
    drawn = {task[i]["question"]: task[i]["answer"] for i in range(400)}
    assert all(drawn[e.user] == e.gold for e in train)
    assert [e.user for e in train] == [e.user for e in gym.examples(NAME, "train", 120, 0)]
    assert {e.user for e in train} != {e.user for e in gym.examples(NAME, "train", 120, 1)}


def test_a_small_task_gives_what_it_has():
    few = gym.examples("chain_sum?min_terms=2&max_terms=2&max_digits=1&allow_negation=false", "train", 500, 0)
    assert 0 < len(few) < 500 and len({e.user for e in few}) == len(few)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chain_sun", ["chain_sun", "did you mean chain_sum"]),
        ("chain_sum?terms=3", ["terms"]),
        ("chain_sum?seed=3", ["seed=3", "run.seed"]),
        ("chain_sum?min_terms=9&max_terms=2", ["refuses", "max_terms"]),
    ],
)
def test_bad_names_are_explained(name, words):
    with pytest.raises(UserError) as error:
        gym.examples(name, "train", 3, 0)
    assert all(word in str(error.value) for word in words)


def test_a_split_that_is_not_there():
    with pytest.raises(UserError, match="no split 'test'"):
        open_source("reasoning-gym:chain_sum", "test", 3, 0)


def test_the_task_grades_its_own_problems():
    data = cfg.Problems(source=f"reasoning-gym:{NAME}", max_rows=3)
    prompt = load_prompts(data, load("embedded"), 0)[0]
    assert prompt.row["metadata"]["source_dataset"] == "chain_sum"

    def score(text):
        return rewards.get("reasoning_gym").function(Sample(prompt.text, text, prompt.gold, 5, 9, False, prompt.row))

    assert score(f"<think>so</think> {prompt.gold}") == 1.0
    assert score("<think>so</think> 123456789") < 1.0
    assert score(f"<think>{prompt.gold}") == 0.0
    near = rewards.get("reasoning_gym", partial="drop")
    wrong = Sample(prompt.text, "123456789", prompt.gold, 5, 9, False, prompt.row)
    assert near.function(wrong, **near.options) == 0.0


def test_a_sample_of_another_source_is_refused():
    with pytest.raises(UserError, match="reasoning-gym:NAME"):
        call(rewards.get("reasoning_gym"), [Sample("q", "4", "4", 1, 2, False)])


def test_columns_reach_the_reward_and_a_missing_one_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1), "level": i}) for i in range(3)))
    kept = load_prompts(cfg.Problems(source=str(path), keep_columns=["level"]), load("embedded"), 0)
    assert [p.row for p in kept.prompts] == [{"level": 0}, {"level": 1}, {"level": 2}]
    assert load_prompts(cfg.Problems(source=str(path)), load("embedded"), 0)[0].row is None
    message = r"no column lvl, which data.keep_columns names: 3; first: .*rows.jsonl, line 1: it has question, answer, level"
    with pytest.raises(UserError, match=message):
        load_prompts(cfg.Problems(source=str(path), keep_columns=["lvl"]), load("embedded"), 0)
