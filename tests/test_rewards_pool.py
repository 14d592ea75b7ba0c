"""The registry and the pool, with graders that raise, hang, crash and lie."""

import dataclasses
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from jaxreason.errors import UserError
from jaxreason.rewards import Sample, get
from jaxreason.rewards.pool import GradeError, RewardPool

GRADERS = '''
import ctypes, os, subprocess, sys, time
import numpy as np
from jaxreason.errors import UserError
from jaxreason.rewards import Scored, reward

def tokens(sample, *, scale: float = 1.0):
    return sample.completion_tokens * scale

def act(sample):
    """Does what the completion says."""
    word, _, rest = sample.completion.partition(" ")
    if word == "raise":
        raise KeyError("no such thing")
    if word == "exit":
        sys.exit(3)
    if word == "sleep":
        time.sleep(600)
    if word == "loop":
        while True:
            pass
    if word == "power":
        return 9**9**9
    if word == "die":
        os._exit(7)
    if word == "segfault":
        ctypes.string_at(0)
    if word == "child":
        subprocess.Popen([sys.executable, "-c", f"import time; open({rest!r}, 'w').write('x'); time.sleep(600)"])
        time.sleep(600)
    if word == "memory":
        return len(bytearray(2**40))
    if word == "config":
        raise UserError("reward act: bad option")
    if word == "print":
        print("noise")
    return {"nan": float("nan"), "inf": -float("inf"), "text": "1.0", "list": [1.0], "none": None, "true": True,
            "numpy": np.float32(0.5)}.get(word, 1.0)

@reward(batch=True)
def spread(samples, mode="rank"):
    if mode == "short":
        return [1.0]
    if mode == "number":
        return 1.0
    if mode == "hang":
        time.sleep(600)
    lengths = [sample.completion_tokens for sample in samples]
    rewards = [float(sum(other < own for other in lengths)) for own in lengths]
    return [None, float("nan"), *rewards[2:]] if mode == "holes" else rewards

@reward(fills=("token_reward",))
def scored(sample):
    values = {"right": np.array([0.5, -1.0, 2.0]), "short": [1.0, 2.0], "nan": [1.0, float("nan"), 2.0], "far": [1, 1e39, 2],
              "text": ["x"] * 3}
    word = sample.completion
    if word in ("none", "number"):
        return 1.0 if word == "number" else None
    given = {"other": {"token_rewards": [1, 2, 3]}, "without": {}, "list": [1, 2, 3]}
    return Scored(None if word == "no reward" else 4.0, given.get(word, {"token_reward": values.get(word, (1, 2, 3))}))

@reward(fills=("token_reward",), batch=True)
def scored_batch(samples):
    return [scored(sample) for sample in samples]

def process(sample):
    return float(os.getpid())

def imports_jax(sample):
    return float("jax" in sys.modules)
'''


@pytest.fixture(scope="module")
def graders(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("graders") / "graders.py"
    path.write_text(GRADERS)
    return str(path)


def samples(*completions: str, gold: str | None = "5") -> list[Sample]:
    return [Sample("q", text, gold, index, 100, False) for index, text in enumerate(completions)]


def pool(*functions, workers=2, timeout_s=20.0, on_error="count") -> RewardPool:
    weighted = [item if isinstance(item, tuple) else (item, 1.0) for item in functions]
    return RewardPool(weighted, workers, timeout_s, on_error)


def by_sample(graded) -> dict[int, tuple[str, str]]:
    return {error.sample: (error.kind, error.message) for error in graded.errors}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_rewards_in_order_with_weights(workers, graders):
    items = samples(r"<think>a</think>\boxed{5}", r"\boxed{5}", "<think>a</think>4", "") * 10
    with pool((get("exact_answer"), 1.0), (get("format"), 0.5), (get(f"{graders}:tokens", scale=2.0), -0.1),
              workers=workers) as grader:  # fmt: skip
        graded = grader.grade(items)
        again = grader.grade(items)
    assert graded.names == ("exact_answer", "format", f"{graders}:tokens")
    expected = np.array([[1, 1, 0], [1, 0, 2], [0, 1, 4], [0, 0, 6]] * 10, float)
    np.testing.assert_array_equal(graded.rewards, expected)
    assert graded.total == pytest.approx([1.5, 0.8, 0.1, -0.6] * 10)
    assert graded.errors == [] and graded.seconds > 0
    assert graded.counts["format"] == {"rewarded": 40, "none": 0, "failed": 0}
    np.testing.assert_array_equal(again.rewards, expected)


def test_no_reward_is_not_zero(graders):
    items = samples("5", gold=None) + samples("none")
    with pool(get("accuracy"), (get(f"{graders}:act"), 2.0), workers=0) as grader:
        graded = grader.grade(items)
        assert grader.grade([]).rewards.shape == (0, 2)
    np.testing.assert_array_equal(graded.rewards, [[np.nan, 1.0], [0.0, np.nan]])
    assert graded.total == [2.0, 0.0]
    with pool(get("accuracy"), workers=0) as grader:
        graded = grader.grade(items)
    assert graded.total == [None, 0.0]
    assert graded.counts == {"accuracy": {"rewarded": 1, "none": 1, "failed": 0}}


@pytest.mark.parametrize("workers", [0, 2])
def test_lies_and_exceptions_cost_their_sample(workers, graders):
    words = ["ok", "raise", "exit", "nan", "inf", "text", "list", "none", "true", "numpy", "print"]
    with pool(get(f"{graders}:act"), get(f"{graders}:tokens"), workers=workers) as grader:
        graded = grader.grade(samples(*words))
    errors = by_sample(graded)
    assert {words[i]: kind for i, (kind, _) in errors.items()} == {
        "raise": "raised", "exit": "raised", "nan": "not_finite", "inf": "not_finite", "text": "wrong_type",
        "list": "wrong_type",
    }  # fmt: skip
    assert errors[1][1].startswith("KeyError: 'no such thing' (graders.py, line ")
    assert errors[3][1] == "returned nan" and "returned a str" in errors[5][1]
    # A sample on which one function failed has no total, though the other function had a reward for it.
    assert graded.total == [1.0, None, None, None, None, None, None, 7.0, 9.0, 9.5, 11.0]
    assert graded.rewards[:, 1].tolist() == list(range(11))
    assert graded.counts[f"{graders}:act"] == {"rewarded": 4, "none": 1, "failed": 6}


def test_hanging_and_crashing_graders_cost_one_sample_each(graders, capfd):
    words = ["ok", "sleep", "ok", "loop", "power", "ok", "die", "segfault", "memory", *["ok"] * 30]
    with pool(get(f"{graders}:act"), get(f"{graders}:tokens"), timeout_s=1.5) as grader:
        graded = grader.grade(samples(*words))
        errors = by_sample(graded)
        assert {words[i]: kind for i, (kind, _) in errors.items()} == {
            "sleep": "timeout", "loop": "timeout", "power": "timeout", "die": "crashed", "segfault": "crashed",
            "memory": "raised",
        }  # fmt: skip
        assert errors[1][1] == "took more than 1.5 s"
        assert errors[6][1] == "the process exited with status 7"
        assert errors[7][1] == "the process died of SIGSEGV"
        assert errors[8][1].startswith("MemoryError")
        assert [error.sample for error in graded.errors] == sorted(errors)
        assert [i for i, total in enumerate(graded.total) if total is None] == sorted(errors)
        assert graded.rewards[:, 1].tolist() == list(range(len(words)))
        assert grader.grade(samples("print", "ok")).total == [1.0, 2.0]  # the replacements work on
    assert capfd.readouterr().out == ""  # what graders print is not the run's output


def test_towers_of_powers_in_an_answer_cost_one_sample():
    texts = [r"\boxed{9**9**9}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10!)!!}", r"\boxed{5}"]
    with pool(get("accuracy"), timeout_s=1.5) as grader:
        graded = grader.grade(samples(*texts))
    assert graded.total[3] == 1.0
    assert all(total in (0.0, None) for i, total in enumerate(graded.total) if i != 3)
    assert {error.kind for error in graded.errors} <= {"timeout", "raised"}


def test_what_a_killed_grader_started_dies_with_it(graders, tmp_path):
    started = tmp_path / "started"
    with pool(get(f"{graders}:act"), get(f"{graders}:process"), workers=1, timeout_s=2.0) as grader:
        group = int(grader.grade(samples("ok")).rewards[0, 1])  # a worker leads the group of what it starts
        graded = grader.grade(samples(f"child {started}"))
    assert by_sample(graded)[0][0] == "timeout" and started.exists()
    alive = [stat for stat in Path("/proc").glob("[0-9]*/stat") if _group_of_running(stat) == group]
    assert alive == []


def _group_of_running(stat: Path) -> int | None:
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return int(group) if state != "Z" else None


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_functions(workers, graders):
    items = samples("a", "b", "c")
    with pool(get(f"{graders}:spread"), workers=workers) as grader:
        assert grader.grade(items).total == [0, 1, 2]
        assert grader.grade([]).total == []
    with pool(get(f"{graders}:spread", mode="holes"), workers=workers) as grader:
        graded = grader.grade(items)
    assert graded.total == [None, None, 2] and by_sample(graded) == {1: ("not_finite", "returned nan")}
    with pool(get(f"{graders}:spread", mode="short"), workers=workers) as grader:
        error = ("wrong_length", "returned 1 rewards for 3 samples")
        assert by_sample(grader.grade(items)) == dict.fromkeys(range(3), error)
    with pool(get(f"{graders}:spread", mode="number"), workers=workers) as grader:
        assert {kind for kind, _ in by_sample(grader.grade(items)).values()} == {"wrong_type"}


EXTRAS = {
    "right": None, "none": None, "no reward": None,
    "short": "extras['token_reward'] holds 2 numbers for 3 tokens",
    "nan": "extras['token_reward'] is nan at token 1",
    "far": "extras['token_reward'] is inf at token 1",
    "other": "filled extras['token_rewards'], which it does not declare in fills; did you mean token_reward?",
    "without": "declares that it fills token_reward and returned no extras['token_reward']",
    "number": "declares fills=['token_reward'] but returned a number without extras; use Scored",
    "text": "extras['token_reward'] is no sequence of numbers: could not convert string to float: 'x'",
    "list": "extras is a list, not a dict of sequences",
}  # fmt: skip


@pytest.mark.parametrize(("workers", "function"), [(0, "scored"), (1, "scored"), (0, "scored_batch")])
def test_a_reward_fills_extras(workers, function, graders):
    items = [dataclasses.replace(sample, tokens=(7, 8, 9)) for sample in samples(*EXTRAS)]
    with pool(get(f"{graders}:{function}"), get("format"), workers=workers) as grader:
        assert grader._rewards[0].fills == {"token_reward"} and grader._rewards[1].fills == frozenset()
        graded = grader.grade(items)
    assert {list(EXTRAS)[i]: error for i, error in by_sample(graded).items()} == {
        case: ("wrong_extras", message) for case, message in EXTRAS.items() if message
    }
    filled = {case: extras.get("token_reward") for case, extras in zip(EXTRAS, graded.extras)}
    np.testing.assert_array_equal(filled["right"], np.array([0.5, -1.0, 2.0], np.float32))
    assert filled["right"].dtype == np.float32
    np.testing.assert_array_equal(filled["none"], np.zeros(3))  # no reward, and nothing by token
    np.testing.assert_array_equal(filled["no reward"], [1, 2, 3])
    assert all(filled[case] is None for case, message in EXTRAS.items() if message)
    assert graded.total[:3] == [4.0, 0.0, 0.0]  # the sums are those of the numbers


def test_two_rewards_do_not_fill_the_same_extra(graders):
    with pytest.raises(UserError, match="'token_reward'.* is filled by reward .*:scored' and by .*:scored_batch'"):
        pool(get(f"{graders}:scored"), get(f"{graders}:scored_batch"), workers=0)


def test_a_batch_that_hangs_fails_whole_and_alone(graders):
    with pool(get(f"{graders}:spread", mode="hang"), get("accuracy"), timeout_s=1.0) as grader:
        graded = grader.grade(samples("5", "4"))
    assert [(error.sample, error.kind) for error in graded.errors] == [(0, "timeout"), (1, "timeout")]
    assert graded.rewards[:, 1].tolist() == [1, 0] and graded.total == [None, None]


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_names_the_function_and_the_sample(workers, graders):
    with pool(get("format"), get(f"{graders}:act"), workers=workers, on_error="stop") as grader:
        with pytest.raises(UserError, match=r"graders\.py:act', sample 2: raised: KeyError"):
            grader.grade(samples("ok", "ok", "raise", *["ok"] * 20))
        assert grader.grade(samples("ok")).total == [1.0]  # nothing of the abandoned call is left
    assert str(GradeError("f", 3, "timeout", "late")) == "reward 'f', sample 3: timeout: late"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_of_a_function_always_stops(workers, graders):
    with pool(get(f"{graders}:act"), workers=workers) as grader, pytest.raises(UserError, match="bad option"):
        grader.grade(samples("ok", "config"))


def test_workers_are_light_and_gone_after_close(graders):
    with pool(get(f"{graders}:imports_jax"), get(f"{graders}:process"), workers=2) as grader:
        graded = grader.grade(samples(*["ok"] * 40))
        assert graded.rewards[:, 0].tolist() == [0.0] * 40
        ids = {int(pid) for pid in graded.rewards[:, 1]}
        assert os.getpid() not in ids
    grader.close()
    assert not [pid for pid in ids if Path(f"/proc/{pid}").exists()]  # nor a zombie of one
    with pytest.raises(ValueError, match="closed"):
        grader.grade(samples("ok"))


def test_an_idle_worker_that_died_is_replaced_at_no_sample_s_cost(graders):
    with pool(get(f"{graders}:process"), workers=2) as grader:
        grader.grade(samples(*["ok"] * 64))
        victim = next(worker for worker in grader._workers if worker.ready)
        victim._process.popen.kill()
        victim._process.popen.wait()
        graded = grader.grade(samples(*["ok"] * 64))
        assert graded.errors == [] and None not in graded.total
        assert victim not in grader._workers


def test_the_package_imports_no_jax_and_needs_no_main_guard(tmp_path, graders):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import sys
        from jaxreason.rewards import Sample, get
        from jaxreason.rewards.pool import RewardPool
        assert "jax" not in sys.modules
        print("main ran")
        pool = RewardPool([(get("{graders}:tokens"), 1.0)], 2, 20.0, "count")
        print(pool.grade([Sample("q", "a", None, 7, 9, False)]).total)
    """))  # and no close(): the interpreter's end takes the workers with it
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "main ran\n[7.0]\n", "")


def test_workers_end_with_a_run_that_was_killed(tmp_path, graders):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import os, signal
        from jaxreason.rewards import Sample, get
        from jaxreason.rewards.pool import RewardPool
        pool = RewardPool([(get("{graders}:process"), 1.0)], 1, 20.0, "count")
        print(int(pool.grade([Sample("q", "a", None, 7, 9, False)]).total[0]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    for _ in range(100):
        state = Path(f"/proc/{done.stdout.strip()}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its pool")


def test_a_function_that_workers_cannot_load(tmp_path):
    path = tmp_path / "once.py"
    path.write_text("def f(sample):\n    return 1.0\n")
    reward = get(f"{path}:f")
    path.write_text("import nothing_of_this_name\n")
    with pool(reward, workers=1) as grader, pytest.raises(UserError, match=r"cannot start: .*nothing_of_this_name"):
        grader.grade(samples("a"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1, 1.0, "count"), "no reward function"),
        (([(get("format"), 1.0), (get("format"), 2.0)], 1, 1.0, "count"), "'format' is given twice"),
        (([(get("format"), math.nan)], 1, 1.0, "count"), "weight is nan"),
        (([(get("format"), 1.0)], -1, 1.0, "count"), "workers is -1"),
        (([(get("format"), 1.0)], 1, 0.0, "count"), "timeout_s 0.0"),
        (([(get("format"), 1.0)], 1, 1.0, "ignore"), "on_error is 'ignore'"),
    ],
)
def test_pools_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        RewardPool(*arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("acuracy", {}, "'acuracy' is unknown; did you mean accuracy"),
        ("zzz", {}, "known: accuracy, countdown, .*, length, repetition, language, exact_answer, or package"),
        ("accuracy", {"multiple_box": "last"}, r"options\.multiple_box: accuracy has no option.*mean multiple_boxed"),
        ("soft_overlong", {"cache_tokens": True}, "cache_tokens is True: a number is expected"),
        ("accuracy", {"multiple_boxed": "first"}, "multiple_boxed is 'first': Input should be 'wrong' or 'last'"),
        ("soft_overlong", {}, "cache_tokens is missing: soft_overlong needs it"),
        ("soft_overlong", {"cache_tokens": "many"}, "cache_tokens is 'many'"),
        ("no_such_module_here:f", {}, "importing no_such_module_here failed: ModuleNotFoundError"),
        ("math:sqr", {}, "math has no function sqr"),
        ("nowhere/file.py:f", {}, "no such file .*nowhere/file.py"),
        ("{graders}:token", {}, "has no function token; did you mean tokens"),
        ("{graders}:tokens", {"scala": 2}, "no option scala; did you mean scale"),
        ("{graders}:tokens", {"scale": "big"}, "scale is 'big'"),
        ("time:time", {}, "must take .* a reward the sample"),
    ],
)
def test_names_and_options_are_checked(name, options, message, graders):
    with pytest.raises(UserError, match=message):
        get(name.format(graders=graders), **options)


def test_custom_functions_by_module_and_by_relative_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def half(sample, **options):\n    return options.get('value', 0.5)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    by_module, by_file = get("my_rewards:half", value=0.25), get("./my_rewards.py:half")
    monkeypatch.chdir("/")
    with pool(by_module, by_file, workers=1) as grader:
        assert grader.grade(samples("a")).rewards.tolist() == [[0.25, 0.5]]
