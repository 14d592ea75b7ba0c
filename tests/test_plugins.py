"""Code of the user's own: loading it once, explaining what is wrong with it, checking its options."""

import subprocess
import sys
from typing import Literal

import pytest

from jaxreason import losses, plugins, rewards
from jaxreason.errors import UserError

FUTURE = '''
from __future__ import annotations
import dataclasses
import jax.numpy as jnp
from jaxreason import losses

@dataclasses.dataclass
class Settings:
    floor: float = 0.1

def f(inputs: losses.PolicyInputs, *, scale: float = 1.0, label: OnlyForTypeCheckers = None):
    x, _ = losses.clean(inputs)
    return -jnp.sum(scale * x.logp * x.advantages) / losses.totals_of(x, _).tokens, {}

def grade(sample, *, scale: float = 1.0):
    return Settings().floor * scale
'''


def test_a_file_with_future_annotations_and_a_dataclass_loads_as_loss_and_as_reward(tmp_path):
    path = tmp_path / "future.py"
    path.write_text(FUTURE)
    loss = losses.get(f"{path}:f", scale=2)
    assert (loss.kind, loss.needs, loss.options) == ("policy", frozenset(), {"scale": 2.0})
    assert rewards.get(f"{path}:grade", scale=3.0).function(None, scale=3.0) == pytest.approx(0.3)
    for get in (losses.get, rewards.get):  # annotations that are text are checked as any others
        with pytest.raises(UserError, match=r"scale is 'big': Input should be a valid number"):
            get(f"{path}:{'f' if get is losses.get else 'grade'}", scale="big")
    assert losses.get(f"{path}:f", label=[1]).options == {"label": [1]}  # nobody can tell what that annotation means


def test_a_file_is_run_once_by_whatever_path(tmp_path, monkeypatch):
    (tmp_path / "counted.py").write_text("import builtins\nruns = getattr(builtins, 'jaxreason_runs', 0) + 1\n"
                                         "builtins.jaxreason_runs = runs\ndef f(x):\n    return runs\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = [plugins.load(target, "k") for target in ("counted.py:f", "./counted.py:f", f"{tmp_path}/counted.py:f")]
    assert found[0] is found[1] is found[2] and found[0](None) == 1
    assert sys.modules[found[0].__module__].f is found[0]
    assert plugins.absolute("counted.py:f") == f"{tmp_path}/counted.py:f" and plugins.absolute("a.b:f") == "a.b:f"


def test_failures_name_key_file_and_line_and_leave_nothing_behind(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ny = x.nothing\n")
    message = rf"^hook\.name {path}:f: importing {path} failed, line 2: AttributeError"
    with pytest.raises(UserError, match=message):
        plugins.load(f"{path}:f", "hook.name")
    path.write_text("raise SystemExit(3)\n")
    with pytest.raises(UserError, match="SystemExit: 3"):
        plugins.load(f"{path}:f", "hook.name")
    path.write_text("from os.path import join\ndef first(x): pass\ndef _own(x): pass\nfirth = 1\n")
    with pytest.raises(UserError, match=r"has no function firs; did you mean first\?; it has first$"):
        plugins.load(f"{path}:firs", "hook.name")
    with pytest.raises(UserError, match="has no function firth"):  # it is there, and no function
        plugins.load(f"{path}:firth", "hook.name")
    for target in ("function", "module:", ":function"):
        with pytest.raises(UserError, match="write package.module:function or path/to/file.py:function"):
            plugins.load(target, "hook.name")


def test_nearest():
    assert plugins.nearest("acuracy", ["format", "accuracy"]) == "; did you mean accuracy?"
    assert plugins.nearest("zzz", ["format"]) == ""


def option(inputs, given_P, *, wide: float = 1.0, count: int = 1, mode: Literal["a", "b"] = "a", flag: bool = False, more=None):
    pass


def test_options_are_checked_by_annotation():
    check = plugins.check_options
    found = check(option, {"wide": 1, "count": 2, "flag": True, "more": True, "mode": "b"}, "k", ("given_P",))
    assert found == {"wide": 1.0, "count": 2, "flag": True, "more": True, "mode": "b"} and type(found["wide"]) is float
    for options, message in [
        ({"wide": True}, "k.wide is True: a number is expected, not a truth value"),
        ({"count": False}, "k.count is False: a number"),
        ({"wide": float("nan")}, "k.wide is nan: a finite number"),
        ({"count": 1.5}, "k.count is 1.5: Input should be a valid integer"),
        ({"mode": "c"}, "k.mode is 'c': Input should be 'a' or 'b'"),
        ({"wid": 1}, r"k.wid: option has no option wid; did you mean wide\?; it has: wide, count, mode, flag, more$"),
        ({"given_P": 1}, "has no option given_P"),
        ({"inputs": 1}, "has no option inputs"),
    ]:
        with pytest.raises(UserError, match=message):
            check(option, options, "k", ("given_P",))
    with pytest.raises(UserError, match=r"k\.given_P is missing: option needs it"):
        check(option, {}, "k")
    assert check(lambda x, **rest: None, {"any": 1}, "k") == {"any": 1}
    with pytest.raises(UserError, match="must take what it is called with"):
        check(lambda *, a=1: None, {}, "k")


def test_a_worker_imports_nothing_slow():
    code = "import sys, jaxreason.rewards.worker; print(sorted({'jax', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
