"""Advantages of rollouts: KL in the reward, a teacher's part by token, corrections, against numbers by hand."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from jaxreason import config as cfg
from jaxreason.data import chat as chats
from jaxreason.data import tokenizer as tokenizers
from jaxreason.data.example import Example
from jaxreason.data.prompts import Prompt
from jaxreason.errors import UserError
from jaxreason.model import preset
from jaxreason.rl import adaptive, grpo, turns
from jaxreason.rl.advantages import advantages_of
from jaxreason.rl.collect import Collector
from jaxreason.rl.objective import find_loss, objective_of
from jaxreason.rl.sequence import Sequence
from jaxreason.sampler import Completion


def settings(**sections):
    base = {
        "algorithm": "grpo", "run": {"name": "x"}, "model": {"preset": "embedded-tiny"},
        "data": {"source": "embedded:arithmetic"}, "train": {"steps": 1},
    }  # fmt: skip
    return cfg.build(base | sections)


def sequence(reward, logp, ref=None, teacher=None, group=0, right=None):
    logp = np.array(logp, np.float32)
    completion = Completion(0, 0, np.arange(len(logp), dtype=np.int32), logp, logp, False, 0)
    rewards = {"accuracy": reward if right is None else right}
    arrays = [None if x is None else np.array(x, np.float32) for x in (ref, teacher)]
    return Sequence(Prompt((1,), "", "", "", 0), completion, "", group, rewards, reward, 0.0, *arrays)


class Fake(SimpleNamespace):
    def __len__(self):
        return 1


def found(config, groups, second=()):
    """Advantages by group, of the first turn or, where there is a second, of both."""
    both = advantages_of(groups, list(second), objective_of(config), config)
    return [[s.advantage for s in group] for turn in both for group in turn]


def test_rloo_takes_its_kl_off_the_reward():
    """Rewards 1, 0, 1 and sequence KLs 0.5, 0.2, -0.1 at beta 0.5: totals 0.75, -0.1, 1.05; leave-one-out by hand."""
    config = settings(loss={"name": "rloo"}, kl={"coef": 0.5})
    group = [
        sequence(1.0, [-1.0, -0.5], [-1.25, -0.75]),
        sequence(0.0, [-1.0], [-1.2]),
        sequence(1.0, [-1.0, -1.0], [-0.9, -1.0]),
    ]
    totals = [0.75, -0.1, 1.05]
    expected = [totals[i] - (sum(totals) - totals[i]) / 2 for i in range(3)]
    np.testing.assert_allclose(found(config, [group])[0], expected, atol=1e-6)
    assert objective_of(config).placement == "reward"
    assert find_loss(config).options["kl_coef"] == 0.0


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "lite_ppo", "remax", "gdpo", "gpg"])
def test_a_row_that_answers_its_own_prompt_changes_no_other_advantage(name):
    """It is in no mean, no spread and no whitening, whatever its tokens, and its own advantage is 0."""
    groups = [[sequence(r, [-1.0] * n) for r, n in pairs] for pairs in (((1.0, 2), (0.0, 3)), ((0.5, 1), (1.0, 4)))]
    groups = [[dataclasses.replace(s, greedy=0.25) for s in group] for group in groups]
    row = [dataclasses.replace(sequence(math.nan, [0.0] * 9), source="data")]
    config = settings(advantage={"name": name})
    *others, own = found(config, [*groups, row])
    for a, b in zip([s for group in others for s in group], [s for group in found(config, groups) for s in group]):
        np.testing.assert_array_equal(a, b)
    assert own == [0.0]


def test_kl_stays_in_the_loss_of_grpo_and_moves_on_request():
    in_loss = settings(kl={"coef": 0.5})
    assert find_loss(in_loss).options["kl_coef"] == 0.5
    group = [sequence(1.0, [-1.0], [-3.0]), sequence(0.0, [-1.0], [-1.0])]
    plain = found(settings(), [group])
    assert found(in_loss, [group]) == plain
    moved = found(settings(kl={"coef": 0.5, "placement": "reward"}, advantage={"name": "center"}), [group])
    np.testing.assert_allclose(moved[0], [0.0, 0.0], atol=1e-6)  # totals 1 - 0.5 * 2 = 0 and 0


def test_reinforce_pp_by_token():
    """-beta k1 at every token, the reward at the last, summed from the right, whitened over all tokens."""
    config = settings(loss={"name": "reinforce_pp"}, kl={"coef": 0.1})
    group = [sequence(1.0, [-1.0, -2.0], [-1.5, -2.0]), sequence(0.0, [-1.0], [-0.5])]
    to_go = np.array([1.0 - 0.1 * 0.5, 1.0, 0.0 + 0.1 * 0.5])
    white = (to_go - to_go.mean()) / (to_go.std(ddof=1) + 1e-8)
    rows = found(config, [group])[0]
    np.testing.assert_allclose(rows[0], white[:2], rtol=1e-5)
    np.testing.assert_allclose(rows[1], white[2:], rtol=1e-5)


def test_reinforce_pp_does_not_jump_where_its_kl_ends():
    """Lengths 2 and 1: by token, the mean of 1 1 0 is 2/3, whatever coefficient is too small to be seen."""
    group = [sequence(1.0, [-1.0, -2.0], [-1.5, -2.0]), sequence(0.0, [-1.0], [-0.5])]
    tiny = found(settings(loss={"name": "reinforce_pp"}, kl={"coef": 1e-12}), [group])[0]
    none = found(settings(loss={"name": "reinforce_pp"}), [group])[0]
    for a, b in zip(tiny, none):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(none[0], [(1 / 3) / math.sqrt(1 / 3)] * 2, rtol=1e-5)  # squares 1/9 1/9 4/9 over 2


def test_reinforce_pp_discounts_by_a_key_of_the_config():
    config = settings(loss={"name": "reinforce_pp"}, advantage={"options": {"gamma": 0.5, "whiten": "none"}})
    rows = found(config, [[sequence(1.0, [-1.0, -2.0, -1.0]), sequence(0.0, [-1.0])]])[0]
    np.testing.assert_allclose(rows[0], [0.25, 0.5, 1.0])


def test_a_preset_has_its_kl_until_a_config_names_one():
    """NeMo-RL's 0.01 in the loss; 0 switches it off, and no reference is kept."""
    for kl, expected in (({}, 0.01), ({"coef": 0.0}, 0.0), ({"coef": 0.2}, 0.2)):
        loss = find_loss(settings(loss={"preset": "nemo"}, kl=kl))
        assert loss.options["kl_coef"] == expected and ("ref_logp" in loss.needs) == (expected > 0)
    objective = objective_of(settings(loss={"preset": "nemo"}))
    assert objective.estimator.name == "grpo_loo" and objective.kl_coef(settings(loss={"preset": "nemo"})) == 0.01
    assert objective_of(settings(loss={"name": "reinforce_pp", "preset": "nemo"})).placement == "loss"
    with pytest.raises(UserError, match="loss.preset prime_rl: prime_rl has no loss grpo"):
        find_loss(settings(loss={"preset": "prime_rl"}))


def test_a_loss_that_adds_tokens_up_says_so_at_the_start():
    """In the table that a run begins with: tic_grpo's ratio is of the whole sequence; grpo has nothing to say."""
    for name, words in (("tic_grpo", "about as many times grpo's as completions have tokens"), ("luspo", "adds"), ("grpo", None)):
        config = settings(loss={"name": name})
        prompts = Fake(sources=())
        inputs = grpo.Inputs(Fake(config=preset("embedded-tiny")), objective_of(config), None, prompts, 8, None, None)
        notes = dict(inputs.rows(config, Fake(rows=8, row_length=16, microbatch=8), None, 1)).get("note")
        assert (notes is None) == (words is None) and (words is None or words in notes), name


def test_gdpo_reads_each_reward_and_cannot_have_kl_in_them():
    with pytest.raises(UserError, match="kl.placement=loss"):
        found(settings(loss={"name": "gdpo"}, kl={"coef": 0.1, "placement": "reward"}), [])


def test_a_teacher_adds_its_log_ratio_to_every_token():
    config = settings(
        advantage={"name": "zero"}, loss={"name": "importance_sampling"}, teacher={"weights": "t", "coef": 2.0}
    )
    rows = found(config, [[sequence(1.0, [-1.0, -2.0], teacher=[-0.5, -3.0]), sequence(0.0, [-1.0], teacher=[-1.0])]])[0]
    np.testing.assert_allclose(rows[0], [1.0, -2.0])
    np.testing.assert_allclose(rows[1], [0.0])


def test_short_groups_count_only_what_they_have():
    rows = found(settings(advantage={"name": "center"}), [[sequence(1.0, [-1]), sequence(0.0, [-1])], [sequence(1.0, [-1])], []])
    assert rows == [[0.5, -0.5], [0.0], []]


def test_a_missing_reward_has_no_advantage():
    rows = found(settings(), [[sequence(1.0, [-1]), sequence(0.0, [-1]), sequence(math.nan, [-1])]])
    assert rows[0][2] == 0.0 and rows[0][0] == pytest.approx(-rows[0][1]) and rows[0][0] > 0


def test_corrections_are_compared_as_asked():
    firsts = [[sequence(1.0, [-1]), sequence(0.0, [-1])]]
    second = [[sequence(1.0, [-1]), sequence(0.0, [-1])], [sequence(1.0, [-1]), sequence(1.0, [-1])]]
    rows = {}
    for compare in ("completion", "prompt", "first"):
        config = settings(advantage={"name": "center"}, second_turn={"samples": 2, "compare": compare})
        rows[compare] = [a for group in found(config, firsts, second) for a in group]
    assert rows["completion"] == [0.5, -0.5, 0.5, -0.5, 0.0, 0.0]
    assert rows["prompt"] == [0.5, -0.5, 0.25, -0.75, 0.25, 0.25]
    assert rows["first"] == [0.5, -0.5, 0.0, -1.0, 1.0, 1.0]


def test_the_measures_of_a_second_layer():
    """Seven trials, of which three have a side that nobody could grade: 1→1, 1→0, 0→1, 0→0 are left."""
    firsts = [sequence(1.0, [-1]), sequence(0.0, [-1]), sequence(math.nan, [-1])]
    second = [
        [sequence(1.0, [-1]), sequence(0.0, [-1]), sequence(math.nan, [-1])],
        [sequence(1.0, [-1]), sequence(0.0, [-1])],
        [sequence(1.0, [-1]), sequence(0.0, [-1])],
    ]
    assert turns.metrics(firsts, second) == {
        "accuracy_t1": 0.5, "accuracy_t2": 0.5, "correction_gain": 0.0, "incorrect_to_correct": 0.25,
        "correct_to_incorrect": 0.25,
    }  # fmt: skip
    nobody = turns.metrics(firsts[2:], second[2:])
    assert set(nobody.values()) == {0.0}


def test_a_confirmed_right_answer_is_trained_like_a_mended_one():
    right, wrong, ungraded = (sequence(reward, [-1]) for reward in (1.0, 0.0, math.nan))
    trained = {mode: [turns.is_trained(s, mode) for s in (right, wrong, ungraded)] for mode in ("verified", "all", "none")}
    assert trained == {"verified": [True, False, False], "all": [True, True, True], "none": [False, False, False]}
    assert not ungraded.trained  # whatever is asked for: there is no reward to learn from


def test_the_second_prompt_shows_the_answer_and_a_doubt_and_ends_no_turn():
    """What the policy wrote stands in the user's turn; control tokens in it, and such as appear by taking one out, do not."""
    tokenizer = tokenizers.load(tokenizers.EMBEDDED)
    chat = chats.resolve(tokenizer)
    phrases = cfg.SecondTurn().phrases
    assert len(phrases) == 7 and len(set(phrases)) == 7
    prompt = Prompt((1,), "", "4", "What is 2+2?", 0)
    found = turns.again(prompt, "<think>5</think> 5<|eot_<|eot_id|>id|>", phrases[0], chat, tokenizer)
    turn = f"What is 2+2?\n<think>\n<think>5</think> 5\n</think>\n{phrases[0]}"
    assert turn in found.text and found.gold == "4"
    assert found.text == chat.render_prompt(Example(turn))
    assert list(found.ids) == tokenizer.encode(found.text)


def test_the_adaptive_bonus_follows_the_entropy_and_survives_a_checkpoint():
    bonus = adaptive.Bonus(cfg.GrpoConfig.model_fields["entropy"].default.model_copy(update={"target": 0.3, "coef": 0.01}))
    assert bonus.after(0.2) == {"entropy_coef": 0.01}  # below the target: up
    assert bonus.now == pytest.approx(0.015) and bonus.after(0.4) == {"entropy_coef": pytest.approx(0.015)}
    assert bonus.now == 0.0  # above it: off, and 0.01 is carried
    again = adaptive.Bonus(cfg.GrpoConfig.model_fields["entropy"].default.model_copy(update={"target": 0.3}))
    again.restore(bonus.state())
    assert again.after(0.1) == bonus.after(0.1) and again.now == bonus.now == pytest.approx(0.015)
    assert adaptive.Bonus(cfg.GrpoConfig.model_fields["entropy"].default).now is None


def test_the_adaptive_kl_follows_its_target_and_survives_a_checkpoint():
    """beta (1 + K clip(kl / target - 1, +-.2)): four times the target is clipped to 1.02, 1.1 times it is 1.01."""
    settings = cfg.Kl(coef=0.1, target=0.05)
    leash = adaptive.Leash(settings)
    assert leash.after(0.2) == {"kl_coef": 0.1}
    assert leash.now == pytest.approx(0.1 * 1.02) and leash.after(0.055) == {"kl_coef": pytest.approx(0.102)}
    assert leash.now == pytest.approx(0.102 * 1.01)
    again = adaptive.Leash(settings)
    again.restore(leash.state())
    assert again.after(0.0) == leash.after(0.0) and again.now == leash.now == pytest.approx(0.102 * 1.01 * 0.98)
    assert adaptive.Leash(cfg.Kl(coef=0.1)).now is None and adaptive.Leash(cfg.Kl(coef=0.1)).after(None) == {}
    with pytest.raises(ValueError, match=r"kl\.target moves the coefficient"):
        cfg.Kl(target=0.05)


def test_every_prompt_is_also_completed_greedily_for_an_estimator_that_compares_with_it():
    """ReMax: completions of 1, 2, 3 tokens earn their length, the greedy one earns 2."""
    jobs = []

    def generate(prompts, job, progress=None):
        jobs.append(job)
        lengths = [2] if job.sampling.temperature == 0.0 else [1, 2, 3]
        return [Completion(p, i, np.arange(n, dtype=np.int32), np.zeros(n), np.zeros(n), False, 0)
                for p in range(len(prompts)) for i, n in enumerate(lengths)]  # fmt: skip

    def grade(samples):
        totals = [float(s.completion_tokens) for s in samples]
        return SimpleNamespace(errors=[], rewards=np.array([totals]).T, total=totals, extras=[{}] * len(samples))

    words = ["rollout.prompts_per_step=2", "rollout.group_size=3", "advantage.name=remax", "rollout.slots=4"]
    config = cfg.load("grpo", words)
    objective = objective_of(config)
    assert objective.greedy and not objective_of(cfg.load("grpo", [])).greedy
    stream = SimpleNamespace(at=lambda i: Prompt((i,), "", "", "", i))
    fakes = SimpleNamespace(generate=generate), stream, SimpleNamespace(decode=lambda ids: ""), None
    pool = SimpleNamespace(grade=grade, names=("length",))
    rollout = Collector(config, *fakes, pool, 8, objective.greedy)(1, 0, 0)
    drawn, greedy = jobs
    assert (greedy.sampling.temperature, greedy.samples, greedy.sampling.max_completion_tokens) == (
        0.0, 1, drawn.sampling.max_completion_tokens)  # fmt: skip
    assert [s.greedy for group in rollout.groups for s in group] == [2.0] * 6
    groups, _ = advantages_of(rollout.groups, [], objective, config)
    assert [[s.advantage for s in group] for group in groups] == [[-1.0, 0.0, 1.0]] * 2
    with pytest.raises(UserError, match=r"Sequence\.greedy is needed"):
        advantages_of(Collector(config, *fakes, pool, 8)(1, 0, 0).groups, [], objective, config)
    with pytest.raises(UserError, match=r"second_turn\.compare=prompt puts corrections of several together"):
        objective_of(cfg.load("grpo", [*words, "second_turn.samples=2", "second_turn.compare=prompt"]))


def test_rewards_of_steps_become_advantages_of_tokens(tmp_path):
    """Two completions of two tokens, a step each: rewards 1 and 0, so z-scores of +-1 / sqrt(2) at both of their tokens."""
    with pytest.raises(UserError, match="advantage.name process reads step_end of every completion, and nothing fills it"):
        objective_of(cfg.load("grpo", ["advantage.name=process"]))
    (tmp_path / "steps.py").write_text(
        "from jaxreason import rewards\n@rewards.reward(fills=('step_reward', 'step_end'))\ndef graded(sample):\n    return 1.0\n"
    )
    graders = f"reward.functions=[{{name: '{tmp_path}/steps.py:graded'}}]"
    words = ["advantage.name=process", "advantage.options={eps: 0.0}", graders]
    config = cfg.load("grpo", words)
    drawn = Completion(0, 0, np.zeros(2, np.int32), np.zeros(2), np.zeros(2), False, 0)
    group = [Sequence(Prompt((1,), "", "", "", 0), drawn, "", 0, {}, 0.5, extras={"step_reward": np.array([0.0, r]),
                      "step_end": np.array([0.0, 1.0])}) for r in (1.0, 0.0)]  # fmt: skip
    groups, _ = advantages_of([group], [], objective_of(config), config)
    for s, expected in zip(groups[0], (math.sqrt(0.5), -math.sqrt(0.5))):
        np.testing.assert_allclose(s.advantage, [expected] * 2, rtol=1e-6)
