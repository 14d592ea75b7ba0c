"""Strategies against a scripted model: what is asked, in which order, and what comes out."""

import re

import pytest
import scripted

from jaxreason.data.example import Example
from jaxreason.errors import UserError
from jaxreason.evaluate import strategies
from jaxreason.evaluate.ask import Ask, Final, Turn
from jaxreason.rewards import get
from jaxreason.rewards.sample import Sample
from jaxreason.sampler import Sampling

LIMIT = Sampling(200, temperature=0.0)
STEPS = {  # of 4 9 10 13: what the model proposes
    "4, 9, 10, 13": "13 - 9 = 4\n10 - 4 = 6 (left: 6 9 13)\n4 + 9 = 13\n10 + 13 = 24\n3 + 4 = 7\nSo: 9 − 13 = -4\n13 - 9 = 4",
    "10, 13, 13": "10 + 13 = 23\n13 - 13 = 0", "4, 4, 10": "10 - 4 = 6\n4 + 4 = 8", "13, 23": "23 - 13 = 10\n13 / 23 = 0",
    "4, 6": "4 * 6 = 24\n4 + 6 = 10", "6, 9, 13": "nothing",
}  # fmt: skip
VALUES = {
    "10, 13, 13": "Hmm. sure", "4, 4, 10": "It is likely.", "6, 9, 13": "impossible", "-4, 4, 10": "I do not know",
    "13, 23": "likely", "0, 10": "impossible", "4, 6": "likely", "8, 10": "impossible",
}  # fmt: skip


def game(prompt, sample):
    numbers = re.search(r"Numbers: ([-0-9, ]+)\.", prompt)[1]
    return STEPS[numbers] if "Combine" in prompt else VALUES[numbers]


def play(word, reply=game, **more):
    asked = scripted.model(reply)
    question = scripted.query(Example("q"), LIMIT, numbers=(4, 9, 10, 13), target=24, **more)
    (outcome,) = asked.run([strategies.get(word).search(question)], 0)
    return outcome, outcome.finals[0].details["tree"], asked.sampler


def visits(tree):
    """The left numbers of every expanded node, in order."""
    order = sorted((node for node in tree["nodes"] if node["visit"] is not None), key=lambda node: node["visit"])
    return [node["text"].rpartition("left: ")[2] for node in order]


def test_breadth_first_visits_exactly_the_kept_nodes_of_each_level():
    outcome, tree, sampler = play("tot_bfs@breadth=2@judges=1")
    assert visits(tree) == ["4 9 10 13", "10 13 13", "4 4 10", "13 23", "4 6"]
    assert outcome.finals[0].text == "The answer is 4 * (10 - (13 - 9))"
    graded = get("countdown").function(
        Sample("", outcome.finals[0].text, '{"nums": [4, 9, 10, 13], "target": 24}', 1, 9, False), answer_in="text"
    )
    assert graded == 1.0
    # 4 states of the first level and 4 of the second are judged; a level's prompts are one call.
    assert tree["judged"] == 8 and tree["visits"] == 5
    assert [len(re.findall("Combine", prompt)) for prompt in sampler.asked] == [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert len(sampler.jobs) == 5


def test_steps_that_break_the_rules_lead_nowhere():
    """A wrong sum, a number that is not there, and the same state again; a minus sign of another kind is one."""
    _, tree, _ = play("tot_bfs@breadth=2@judges=1")
    level = [node for node in tree["nodes"] if node["depth"] == 1]
    assert [node["text"].rpartition("left: ")[2] for node in level] == ["4 4 10", "6 9 13", "10 13 13", "-4 4 10", "4 4 10"]
    assert [node["fate"] for node in level] == ["kept", "dropped", "kept", "dropped", "duplicate"]
    assert [node["value"] for node in level] == [1.0, 0.001, 20.0, 0.0, None]


def test_greedy_misses_what_two_branches_find():
    _, tree, _ = play("tot_bfs@breadth=1@judges=1")
    assert visits(tree) == ["4 9 10 13", "10 13 13", "13 23"]
    assert all(node["fate"] != "solution" for node in tree["nodes"])
    _, tree, _ = play("tot_bfs@breadth=2@judges=1")
    assert sum(node["fate"] == "solution" for node in tree["nodes"]) == 1


def test_depth_first_goes_back_where_nothing_is_left():
    outcome, tree, _ = play("tot_dfs@breadth=2@judges=1")
    assert visits(tree) == ["4 9 10 13", "10 13 13", "13 23", "4 4 10", "4 6"]
    assert outcome.finals[0].text == "The answer is 4 * (10 - (13 - 9))" and not outcome.finals[0].truncated
    fates = {node["text"].rpartition("left: ")[2]: node["fate"] for node in tree["nodes"] if node["fate"] != "duplicate"}
    assert fates["6 9 13"] == fates["8 10"] == fates["0 10"] == "pruned"


def test_depth_first_tries_a_state_once_by_whatever_way_it_is_reached():
    """1 4 is left by two ways; what can be made of it was tried the first time."""
    steps = {"1, 1, 2, 4": "1 + 1 = 2\n2 * 1 = 2", "2, 2, 4": "2 / 2 = 1", "1, 2, 4": "2 - 1 = 1", "1, 4": "1 + 4 = 5"}

    def reply(prompt, sample):
        return steps[re.search(r"Numbers: ([-0-9, ]+)\.", prompt)[1]] if "Combine" in prompt else "likely"

    asked = scripted.model(reply)
    question = scripted.query(Example("q"), LIMIT, numbers=(1, 1, 2, 4), target=99)
    (outcome,) = asked.run([strategies.get("tot_dfs@judges=1").search(question)], 0)
    assert visits(outcome.finals[0].details["tree"]) == ["1 1 2 4", "2 2 4", "1 4", "1 2 4"]
    assert sum("Combine" not in prompt and "Numbers: 1, 4." in prompt for prompt in asked.sampler.asked) == 1


def test_depth_first_stops_at_its_limit_of_visits():
    outcome, tree, _ = play("tot_dfs@breadth=2@judges=1@visits=3")
    assert visits(tree) == ["4 9 10 13", "10 13 13", "13 23"] and tree["visits"] == 3
    assert all(node["fate"] != "solution" for node in tree["nodes"])
    assert outcome.finals[0].text == "The answer is (10 + (4 + 9)) - 13"


def test_judges_are_averaged_and_pruned_branches_are_never_asked():
    """Two of three judges call a state impossible: 1 / 3 · 20 is above the limit, 0.001 is not."""

    def reply(prompt, sample):
        if "Combine" not in prompt and "Numbers: 6, 9, 13." in prompt:
            return ["sure", "impossible", "impossible"][sample]
        return game(prompt, sample)

    _, tree, sampler = play("tot_bfs@breadth=9@judges=3@prune=0.5", reply)
    judged = [node for node in tree["nodes"] if node["depth"] == 1 and node["value"] is not None]
    level = {node["text"].rpartition("left: ")[2]: node for node in judged}
    assert level["6 9 13"]["value"] == pytest.approx((20 + 2 * 0.001) / 3) and level["6 9 13"]["fate"] == "kept"
    assert level["-4 4 10"]["fate"] == "pruned"
    assert not any("Numbers: -4, 4, 10." in prompt and "Combine" in prompt for prompt in sampler.asked)


def test_votes_choose_among_a_level():
    def reply(prompt, sample):
        if "most promising" not in prompt:
            return game(prompt, sample)
        return "The best choice is 1" if "left: 4 4 10" in prompt else "The best choice is 99"

    _, tree, _ = play("tot_bfs@breadth=1@judges=3@evaluate=vote", reply)
    assert visits(tree)[:2] == ["4 9 10 13", "4 4 10"]
    values = [node["value"] for node in tree["nodes"] if node["depth"] == 1 and node["fate"] != "duplicate"]
    assert values == [1.0, 0.0, 0.0, 0.0]


# ---- free questions ---------------------------------------------------------------------------------------------------


def free(prompt, sample):
    if "Does this lead" in prompt:
        return "likely" if "first\n" in prompt.split("answer:\n")[1] and "bad" not in prompt else "impossible"
    begun = prompt.rpartition(">")[2]
    return {"": ["first\nmore", "bad"], "first\n": ["then = 7", "bad = 8"]}.get(begun, ["x", "x"])[sample]


def test_a_free_question_is_answered_line_by_line():
    asked = scripted.model(free)
    for word in ("tot_bfs@breadth=2@judges=1", "tot_dfs@breadth=2@judges=1@prune=0"):
        (outcome,) = asked.run([strategies.get(word).search(scripted.query(Example("q"), LIMIT))], 0)
        assert outcome.finals[0].text == "first\nthen = 7", word


# ---- draws ------------------------------------------------------------------------------------------------------------


def once(word, reply, limit=LIMIT, **more):
    asked = scripted.model(reply)
    (outcome,) = asked.run([strategies.get(word).search(scripted.query(Example("q"), limit, **more))], 0)
    return outcome, asked.sampler


def test_self_consistency_takes_the_answer_of_most():
    said = ["a = 1", "b = 2", "nothing =", "c = 2", "d = 1"]
    outcome, sampler = once("self_consistency@k=5", lambda prompt, sample: said[sample])
    assert outcome.finals[0].text == "a = 1"  # of equals the first
    assert outcome.finals[0].details["share"] == 2 / 5
    outcome, _ = once("self_consistency@k=4", lambda prompt, sample: said[sample])
    assert outcome.finals[0].text == "b = 2"
    assert outcome.drawn == sum(len(text) + 1 for text in said[:4]) and outcome.calls == 1
    assert sampler.jobs[0].sampling.temperature == 0.7 and sampler.jobs[0].samples == 5


def test_best_of_n_takes_the_best_score():
    said = [("short", -2.0), ("a longer one", -1.0), ("mid", -3.0)]
    outcome, _ = once("best_of_n@n=3", lambda prompt, sample: said[sample])
    assert outcome.finals[0].text == "a longer one"
    outcome, _ = once("best_of_n@n=3@scorer=my.py:f", lambda prompt, sample: said[sample], rate=lambda name, texts: [0, 0, 9])
    assert outcome.finals[0].text == "mid"


def thinker(prompt, sample):
    begun = prompt.rpartition(">")[2] if "</think>" not in prompt and "<think>" not in prompt else prompt.partition("\n>")[2]
    if begun.endswith("Wait"):
        return " more</think>= 6"
    if begun.endswith("</think>\n\n") or begun.endswith("The answer is"):
        return "= 9"
    return "<think>12345</think>= 5" if begun == "" else "?"


def test_a_thought_that_ends_too_early_goes_on():
    """<think>12345 is 12 tokens; "Wait" and " more" make 17."""
    outcome, sampler = once("budget@min_tokens=15@max_tokens=100", thinker)
    assert outcome.finals[0].text == "<think>12345\nWait more</think>= 6"
    assert outcome.finals[0].details == {"thinking_tokens": 17, "waits": 1}
    assert sampler.asked[1].endswith(">" + "<think>12345\nWait")
    outcome, _ = once("budget@min_tokens=12@max_tokens=100", thinker)
    assert outcome.finals[0].text == "<think>12345</think>= 5"
    outcome, _ = once("budget@min_tokens=99@max_tokens=100@waits=2", thinker)
    assert outcome.finals[0].text == "<think>12345\nWait more\nWait more</think>= 6"


def test_a_thought_that_lasts_too_long_is_ended():
    outcome, _ = once("budget@max_tokens=10@answer_tokens=5", thinker)
    assert outcome.finals[0].text == "<think>123\n</think>\n\n= 9"
    assert outcome.finals[0].details == {"thinking_tokens": 10, "waits": 0, "ended": True}
    untagged = lambda prompt, sample: thinker(prompt, sample).replace("<think>", "0")  # noqa: E731
    outcome, _ = once("budget@max_tokens=4@answer_tokens=5", untagged)
    assert outcome.finals[0].text == "0123\nThe answer is= 9"


def test_what_is_left_of_a_thought_s_budget_is_all_that_a_later_piece_may_take():
    """12 tokens, and 5 for each of two pieces after "Wait", leave 2 of 24."""
    outcome, _ = once("budget@min_tokens=99@max_tokens=24@answer_tokens=5", thinker)
    assert outcome.finals[0].text == "<think>12345\nWait more\nWait more\nWait m\n</think>\n\n= 9"
    assert outcome.finals[0].details["thinking_tokens"] == 24 and outcome.finals[0].details["waits"] == 3


def test_searches_move_in_step_and_draw_different_noise():
    def two(query):
        replies = yield Ask((Turn(query.example),), LIMIT)
        replies = yield Ask((Turn(query.example, replies[0][0].tokens),), LIMIT)
        return (Final(replies[0][0].text),)

    asked = scripted.model(lambda prompt, sample: "a")
    outcomes = asked.run([two(scripted.query(Example(str(i)), LIMIT)) for i in range(3)], 7)
    assert [outcome.drawn for outcome in outcomes] == [4, 4, 4] and [outcome.read for outcome in outcomes] == [7, 7, 7]
    assert [(job.draw, job.first_prompt) for job in asked.sampler.jobs] == [(0, 7), (16, 7 * 4096)]
    assert asked.sampler.asked == ["0\n>", "1\n>", "2\n>", "0\n>a", "1\n>a", "2\n>a"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tot_bsf", "did you mean tot_bfs"), ("self_consistency@n=3", "has no option n"), ("best_of_n@n", "is not option=value"),
        ("self_consistency@k=0", "greater than or equal to 1"), ("tot_bfs@evaluate=votes", "did you mean vote"),
    ],
)  # fmt: skip
def test_a_wrong_strategy_is_named(word, message):
    with pytest.raises(UserError, match=re.escape(message)):
        strategies.get(word)
