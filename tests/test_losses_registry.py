"""Losses by name, losses of one's own, the start-up check, and eight devices."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import cli, losses
from jaxreason.errors import UserError
from jaxreason.losses import advantage
from jaxreason.losses.check import tiny_inputs

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("drgrpo", {}, "did you mean dr_grpo"),
        ("grpo", {"clip_hi": 0.3}, "has no option clip_hi; did you mean clip_high"),
        ("grpo", {"reduce": "token-men"}, "did you mean token-mean"),
        ("grpo", {"kl_estimator": "k4"}, "'k1', 'k2', 'k3'.*did you mean k3"),
        ("grpo", {"clip_low": "0,2"}, r"loss\.options\.clip_low is '0,2': Input should be a valid number"),
        ("grpo", {"clip_low": None}, "clip_low is None: Input should be a valid number"),
        ("grpo", {"clip_low": True}, "clip_low is True: a number is expected"),
        ("grpo", {"clip_low": float("inf")}, "clip_low is inf: a finite number"),
        ("rho1", {"threshold": None}, "threshold is None"),
        ("jsd", {"beta": -0.1}, "beta is -0.1: Input should be greater than or equal to 0"),
        ("jsd", {"temperature": 0}, "temperature is 0: Input should be greater than 0"),
        ("grpo", {"top_entropy": 20}, "less than or equal to 1"),
        ("grpo", {"correction_max": 2.0}, "choose a correction"),
        ("grpo", {"correction": "mis", "correction_min": 3, "correction_max": 2}, "above correction_max"),
        ("grpo", {"reduce": "token-sum/const"}, "max_completion_tokens"),
        ("clip_cov", {"top_entropy": 0.2}, "choose one"),
        ("clip_cov", {"correction": "tis", "correction_normalize": "step"}, "choose one"),
        ("grpo", {"correction_normalize": "step"}, "choose a correction"),
        ("grpo", {"reject_max": 2.0}, "choose what is measured"),
        ("grpo", {"reject": "seq_mean_k3"}, "set reject_max"),
        ("grpo", {"reject": "seq_mean_k3", "reject_max": 0.1, "reject_min": 0.1}, "no lower bound"),
        ("grpo", {"reject": "token_k1", "reject_max": 0.9}, "its reciprocal is the lower bound"),
        ("grpo", {"reject": "token_k1", "reject_min": 3, "reject_max": 2}, "reject_min 3.0 is above reject_max 2.0"),
        ("real", {"ratio": "token"}, "leave its option ratio at sequence_mean"),
        ("vespo", {"ratio": "sequence_sum"}, "forms the sequence ratio itself"),
        ("nll", {"preset": "trl"}, "applies to policy losses"),
        ("nll", {"kind": "policy"}, "nll is a sft loss"),
        ("nowhere.at.all:f", {}, "importing nowhere.at.all failed: ModuleNotFoundError"),
        ("nowhere.py:f", {}, r"loss\.name nowhere\.py:f: no such file /.*/nowhere\.py"),
    ],
)
def test_wrong_names_and_options_are_explained(name, options, message):
    with pytest.raises(UserError, match=message):
        losses.get(name, **options)


def test_options_are_resolved_and_needs_follow_them():
    loss = losses.get("dapo", kl_coef=0.1, correction="tis")
    assert loss.options["clip_high"] == 0.28 and loss.options["kl_coef"] == 0.1
    assert loss.needs == {"ref_logp", "sampler_logp"} and loss.kind == "policy" and not loss.tokenwise
    assert losses.get("nll", z_loss_coef=1e-4).needs == {"logsumexp"}
    assert losses.get("top_entropy").needs == {"entropy", "selected"}
    assert losses.get("dr_grpo").advantage == "center"


def test_wrong_inputs_are_explained():
    inputs = losses.SftInputs(logp=jnp.zeros((1, 1)), mask=jnp.ones((1, 1)))
    with pytest.raises(UserError, match="takes PolicyInputs, not SftInputs"):
        losses.get("grpo")(inputs)


def test_documented_example_passes_the_check():
    loss = losses.get(f"{ROOT / 'examples' / 'my_loss.py'}:soft_clip", width=0.3)
    assert loss.kind == "policy" and loss.advantage == "center" and loss.needs == frozenset()
    assert loss.options == {"width": 0.3}
    losses.check(loss)


def test_docs_name_every_loss_and_option():
    """A row of a table for every loss and estimator, and every option somewhere."""
    text = (ROOT / "docs" / "losses.md").read_text()
    assert "Since when:" in text
    for name in [*losses.names(), *advantage.ESTIMATORS]:
        assert f"\n| `{name}` |" in text, name
    for name in losses.names():
        for option in losses.defaults(name):
            assert f"`{option}`" in text, f"{name}: {option}"


HEAD = "import jax, jax.numpy as jnp\nfrom jaxreason import losses\n"


def own(tmp_path, body, **options):
    file = tmp_path / "mine.py"
    file.write_text(HEAD + body)
    return losses.get(f"{file}:f", **options)


def test_own_losses_in_a_few_lines(tmp_path, monkeypatch):
    """Undeclared, with plain arithmetic: kind from the annotation, needs from what it reads."""
    body = """
def f(inputs: losses.SftInputs, scale=1.0):
    nll = jnp.where(inputs.mask > 0, -inputs.logp, 0.0)
    extra = jnp.where(inputs.mask > 0, inputs.entropy, 0.0)
    return jnp.sum(scale * nll + extra) / inputs.totals.tokens, {}
"""
    loss = own(tmp_path, body, scale=2.0)
    assert (loss.kind, loss.needs, loss.tokenwise) == ("sft", {"entropy"}, False)
    losses.check(loss)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert losses.get("mine:f").needs == {"entropy"}
    with pytest.raises(UserError, match="no option scal; did you mean scale"):
        losses.get("mine:f", scal=1.0)
    with pytest.raises(UserError, match="no function g"):
        losses.get("mine:g")


CLEAN = "    x, s = losses.clean(inputs)\n    n = losses.totals_of(x, s).tokens\n"
BUGS = {
    "mean over the batch": (
        "def f(inputs):\n    x, _ = losses.clean(inputs)\n    return -jnp.mean(x.logp), {}\n",
        "how the batch is split",
    ),
    "own mask count": (
        "def f(inputs):\n    x, _ = losses.clean(inputs)\n"
        "    return -jnp.sum(x.logp) / jnp.maximum(1, jnp.sum(x.mask)), {}\n",
        "how the batch is split",
    ),
    "mask by multiplication": (
        "def f(inputs):\n    r = jnp.exp(inputs.logp - inputs.old_logp) * inputs.mask\n"
        "    return -jnp.sum(r * inputs.advantages) / inputs.totals.tokens, {}\n",
        "at masked positions changes the value",
    ),
    "where after exp": (
        "def f(inputs):\n    r = jnp.where(inputs.mask > 0, jnp.exp(inputs.logp), 0.0)\n"
        "    return -jnp.sum(r) / inputs.totals.tokens, {}\n",
        "at masked positions changes the gradient",
    ),
    "padded width": (
        "def f(inputs):\n    x, _ = losses.clean(inputs)\n"
        "    return -jnp.sum(jnp.mean(x.logp, axis=1)) / inputs.totals.sequences, {}\n",
        "the padding of its rows",
    ),
    "poisoned metric": (
        f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n, {{'m': jnp.sum(inputs.logp * inputs.mask) / n}}\n",
        "changes metric 'm'",
    ),
    "metric of text": (f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n, {{'m': 'x'}}\n", "metric 'm' is a str"),
    "metric without name": (f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n, {{3: n}}\n", "is called 3"),
    "metric of the step": (f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n, {{'loss': n}}\n", "is called 'loss'"),
    "metrics in a list": (f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n, [n]\n", r"returned \(array, list\)"),
    "half precision": (
        f"def f(inputs):\n{CLEAN}    return (-jnp.sum(x.logp) / n).astype(jnp.float16), {{}}\n", "float32 is expected"
    ),
    "an integer": (f"def f(inputs):\n{CLEAN}    return jnp.sum(x.mask > 0), {{}}\n", "dtype int32"),
    "a number of python": ("def f(inputs):\n    return 1.5, {}\n", "no gradient"),
    "nothing": ("def f(inputs):\n    pass\n", "returned NoneType"),
    "no value": ("def f(inputs):\n    return None, {}\n", "its value is a NoneType"),
    "numpy": ("import numpy\ndef f(inputs):\n    return numpy.exp(inputs.logp).sum(), {}\n", r"line 5.*jax\.numpy"),
    "a branch": (
        f"def f(inputs):\n{CLEAN}    return (jnp.sum(x.logp) if x.logp[0, 0] > 0 else n), {{}}\n", "`if` on values"
    ),
    "unknown field": ("def f(inputs):\n    return inputs.logprobs, {}\n", "PolicyInputs.*did you mean logp"),
    "exits": ("def f(inputs):\n    raise SystemExit(0)\n", "SystemExit"),
    "missing option": ("def f(inputs, scale):\n    return scale, {}\n", "loss.options.scale is missing"),
    "no inputs": ("def f():\n    return 0.0, {}\n", "f must take what it is called with"),
    "not a scalar": (f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp, axis=1) / n, {{}}\n", r"shape \(5,\)"),
    "no metrics": (
        f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n\n", r"must return \(value, metrics\) .* but returned array\b"
    ),
    "mean over the batch in small units": (
        "def f(inputs):\n    x, _ = losses.clean(inputs)\n    return -1e-6 * jnp.mean(x.logp), {}\n",
        "how the batch is split",
    ),
    "a metric of the batch in small units": (
        f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n, {{'m': 1e-7 * jnp.mean(x.logp)}}\n", "metric 'm' is"
    ),
    "a cube in the exponent": (
        f"def f(inputs):\n{CLEAN}    return -jnp.sum(jnp.exp((x.logp - x.old_logp) ** 3)) / n, {{}}\n",
        "its value is -?inf where the log-probs are 20 nats from the old ones",
    ),
    "wrong broadcast": (
        f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp * jnp.ones(3)) / n, {{}}\n",
        r"mine\.py, line 6",
    ),
    "nan": (f"def f(inputs):\n{CLEAN}    return jnp.sum(jnp.log(x.logp)) / n, {{}}\n", "is nan on a tiny batch"),
    "infinite gradient": (
        f"def f(inputs):\n{CLEAN}    return jnp.sum(jnp.sqrt(x.logp - x.logp) + x.logp) / n, {{}}\n",
        "gradient by inputs.logp is",
    ),
    "no gradient": (
        f"def f(inputs):\n{CLEAN}    return jnp.sum(jax.lax.stop_gradient(x.logp)) / n, {{}}\n",
        "no gradient",
    ),
    "metric": (f"def f(inputs):\n{CLEAN}    return -jnp.sum(x.logp) / n, {{'m': jnp.mean(x.logp)}}\n", "metric 'm' is"),
    "undeclared need": (
        f"@losses.loss(kind='policy', needs=())\ndef f(inputs):\n{CLEAN}"
        f"    return jnp.sum(x.ref_logp - x.logp) / n, {{}}\n",
        "outside its `needs` are None",
    ),
    "not tokenwise": (
        "@losses.loss(kind='sft', tokenwise=True)\ndef f(inputs):\n    x, s = losses.clean(inputs)\n"
        "    w = losses.reduction_weights('seq-mean-token-mean', x, s, losses.totals_of(x, s))\n"
        "    return -jnp.sum(w * x.logp), {}\n",
        "chunks of tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_buggy_loss_is_refused(bug, tmp_path):
    body, message = BUGS[bug]
    with pytest.raises(UserError, match=message):
        losses.check(own(tmp_path, body))


@pytest.mark.parametrize(("name", "options"), [("gspo", {}), ("nll", {}), ("grpo", {"preset": "trl", "kl_coef": 0.1})])
def test_built_in_losses_pass_the_check(name, options):
    losses.check(losses.get(name, **options))


def test_a_buggy_loss_ends_the_command_with_a_message(tmp_path, capsys):
    """Exit status 2 and one line, before anything is made."""
    (tmp_path / "bad.py").write_text(HEAD + BUGS["mean over the batch"][0])
    words = ["model.preset=embedded-tiny", "model.weights=null", f"run.dir={tmp_path}", f"loss.name={tmp_path}/bad.py:f"]
    assert cli.train(["--config", "grpo", "--dry-run", *words]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: loss ") and "how the batch is split" in message and len(message.splitlines()) == 1


def test_an_import_path_is_found_from_where_the_command_is_run(tmp_path, monkeypatch):
    """``package.module:function`` in the working directory, which is on no path when a script is run."""
    (tmp_path / "found_here").mkdir()
    (tmp_path / "found_here" / "own.py").write_text((ROOT / "examples" / "my_loss.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        losses.get("found_here.own:soft_clip")
    assert cli.train(["--config", "grpo", "loss.name=found_here.own:soft_clip", "--print-config"]) == 0
    assert losses.get("found_here.own:soft_clip").advantage == "center"


DEVICES = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
import jax, jax.numpy as jnp, numpy as np
import losses_cases as cases, losses_twin as twin
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxreason import losses
assert jax.device_count() == 8
data = {{k: np.concatenate([v, v[::-1]]) for k, v in twin.arrays().items()}}
mask = np.concatenate([twin.MASK, twin.MASK[::-1] * (np.arange(7) > 1)])
ids = np.concatenate([twin.IDS, twin.IDS[::-1] + 100])
groups = np.concatenate([twin.GROUPS, twin.GROUPS[::-1]])
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
names = [("gspo", {{}}), ("kl_cov", {{"reduce": "prompt-mean"}}), ("iw_sft", {{}})]
found = [losses.get(name, **options) for name, options in names]
inputs = [cases.make(x.kind, data, mask=mask, ids=ids, groups=groups, keys=x.needs) for x in found]
run = jax.jit(lambda inputs: [cases.value_and_grad(x, i) for x, i in zip(found, inputs)])
one = run(inputs)
eight = run(jax.device_put(inputs, sharding))
assert len(eight[0][2].sharding.device_set) == 8
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6), one, jax.device_get(eight))
"""


def test_eight_devices_equal_one():
    """In its own process: the number of devices is fixed when jax starts."""
    code = DEVICES.format(tests=str(ROOT / "tests"))
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_loss_of_ones_own_is_watched_as_the_built_in_ones_are():
    """soft_clip returns one metric; ratios, entropy and the sampler's gap are those that grpo reports."""
    inputs = tiny_inputs("policy")
    own = losses.get(f"{ROOT}/examples/my_loss.py:soft_clip")(inputs)[1]
    grpo = losses.get("grpo", kl_coef=0.1)(inputs)[1]
    shared = set(grpo) - {"clip_fraction", "clip_low_fraction", "clip_high_fraction"}
    assert set(own) == shared | {"saturated_fraction"}
    for name in shared:
        np.testing.assert_allclose(own[name], grpo[name], rtol=1e-6, err_msg=name)
