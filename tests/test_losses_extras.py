"""What a loss reads decides what it gets: extras, needs found by tracing, needs of the built-in losses, shapes."""

import array
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import losses, rewards
from jaxreason.errors import UserError
from jaxreason.losses import kl
from jaxreason.losses.check import tiny_inputs
from jaxreason.losses.inputs import OPTIONAL_INPUTS, only
from jaxreason.losses.reduce import whole_step
from jaxreason.rewards.worker import call

HEAD = "import dataclasses, jax, jax.numpy as jnp\nfrom jaxreason import losses\n"
SHAPED = """
@losses.loss(kind="policy", needs=("token_reward",))
def f(inputs, scale: float = 1.0):
    x, s = losses.clean(inputs)
    return -jnp.sum((x.advantages + scale * x.extras["token_reward"]) * x.logp) / losses.totals_of(x, s).tokens, {}
"""


def own(tmp_path, body, **options):
    file = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.py"  # a file is run once
    file.write_text(HEAD + body)
    return losses.get(f"{file}:f", **options)


def test_a_loss_reads_what_another_fills(tmp_path):
    loss = own(tmp_path, SHAPED, scale=2)
    assert loss.needs == loss.extras == {"token_reward"}
    losses.check(loss)
    inputs = losses.PolicyInputs(
        logp=jnp.asarray([[-1.0, -2.0, -4.0]]), old_logp=jnp.zeros((1, 3)), advantages=jnp.asarray([[1.0, 1.0, 9.0]]),
        mask=jnp.asarray([[1.0, 1.0, 0.0]]),
        extras={"token_reward": jnp.asarray([[0.5, -1.0, np.nan]]), "other": jnp.ones((1, 3))},
    )  # fmt: skip
    # (1 + 2 * 0.5) * 1 and (1 - 2 * 1) * 2, over two tokens
    np.testing.assert_allclose(loss(inputs)[0], (2.0 - 2.0) / 2, atol=1e-7)
    np.testing.assert_allclose(own(tmp_path, SHAPED, scale=1)(inputs)[0], (1.5 + 0.0) / 2)


def test_the_documented_ones_run(tmp_path):
    """docs/losses.md: a loss with extras, a reward and an estimator that fill some."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "losses.md").read_text(), re.DOTALL)
    file = tmp_path / "documented.py"
    file.write_text("\n".join(blocks))
    loss = losses.get(f"{file}:shaped", scale=0.5)
    losses.check(loss)
    reward = rewards.get(f"{file}:early")
    losses.check_filled(loss, dict.fromkeys(reward.fills, "reward early") | {"old_entropy": "the loop"})
    outcome = call(reward, [rewards.Sample("q", "it is 42", None, 4, 9, False, tokens=(1, 2, 3, 4))])[0]
    assert outcome == ("reward", 1.0, {"token_reward": array.array("f", [1.0, 0.75, 0.5, 0.25])})
    advantages, extras = losses.advantage.get(f"{file}:by_age", decay=0.5)(np.array([[2.0]]), lengths_P_G=np.array([[3]]))
    np.testing.assert_array_equal(advantages[0][0], [2.0, 1.0, 0.5])
    np.testing.assert_array_equal(extras["age"][0][0], [0, 1, 2])


def test_what_is_not_declared_is_not_there(tmp_path):
    """Neither an extra nor an optional input, though the batch has it for others; the shared metrics go on reading theirs."""
    body = '@losses.loss(kind="policy", needs=("token_reward", "entropy"))\ndef f(inputs):\n' + """
    assert set(inputs.extras) == {"token_reward"} and inputs.entropy is not None
    assert inputs.ref_logp is None and inputs.sampler_logp is None and inputs.group_tokens is None
    x, s = losses.clean(inputs)
    return -jnp.sum(x.logp * x.extras["token_reward"] * x.entropy) / x.totals.tokens, {}
"""
    metrics = own(tmp_path, body)(tiny_inputs("policy", ["token_reward", "old_entropy"]))[1]
    assert {"sampler_gap", "kl", "entropy"} <= set(metrics)


READS = {
    "by name": ("x.extras['a']", {"a"}),
    "get": ("x.extras.get('a', 0.0)", {"a"}),
    "in": ("(x.extras['a'] if 'a' in x.extras else 0.0)", {"a"}),
    "before cleaning": ("jnp.where(inputs.mask > 0, inputs.extras['a'] * inputs.entropy, 0.0)", {"a", "entropy"}),
    "of its own making": ("dataclasses.replace(x, extras={'mine': x.logp}).extras['mine']", set()),
    "a copy": ("dataclasses.replace(x, advantages=x.logp).advantages", set()),
    "reference": ("x.ref_logp", {"ref_logp"}),
    "a built-in loss": ("losses.get('dapo', kl_coef=0.1)(dataclasses.replace(inputs, advantages=x.logp))[0]", {"ref_logp"}),
    "a built-in loss that reads nothing": ("losses.get('dapo')(inputs)[0]", set()),
    "another of one's own": ("losses.get(f'{__file__}:other')(inputs)[0]", {"a", "entropy"}),
}
OTHER = """
@losses.loss(kind="policy", needs=("a", "entropy"))
def other(inputs):
    return -jnp.sum(losses.clean(inputs)[0].logp), {}
"""


@pytest.mark.parametrize("case", READS)
def test_needs_are_found_by_tracing(case, tmp_path):
    term, expected = READS[case]
    body = f"def f(inputs):\n    x, s = losses.clean(inputs)\n    return jnp.sum(x.logp + {term}), {{}}\n"
    assert own(tmp_path, OTHER + body).needs == expected


WRONG = {
    "poison": ("jnp.sum(inputs.extras['a'] * inputs.mask * inputs.logp) / inputs.totals.tokens", "at masked positions changes"),
    "split": ("jnp.sum(x.logp * jnp.mean(x.extras['a'])) / x.totals.tokens", "how the batch is split"),
    "root of a negative": ("jnp.sum(x.logp * jnp.sqrt(x.extras['a'])) / x.totals.tokens", "nan"),
    "undeclared": ("jnp.sum(x.logp * x.extras['b'])", r"KeyError: 'b' \(extras outside its `needs` are not in inputs.extras\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_check_holds_for_extras(case, tmp_path):
    term, message = WRONG[case]
    body = f"def f(inputs):\n    x, s = losses.clean(inputs)\n    return {term}, {{}}\n"
    with pytest.raises(UserError, match=message):
        losses.check(own(tmp_path, f"@losses.loss(kind='policy', needs=('a',))\n{body}"))


def test_an_entropy_is_positive_in_the_check(tmp_path):
    losses.check(own(tmp_path, SHAPED.replace('x.extras["token_reward"]', "jnp.sqrt(x.extras['old_entropy'])")
                     .replace("token_reward", "old_entropy")))  # fmt: skip


def test_extras_that_nothing_fills_are_explained(tmp_path):
    loss = own(tmp_path, SHAPED.replace("token_reward", "ref_lopg"))
    losses.check_filled(loss, {"ref_lopg": "reward r"})
    with pytest.raises(UserError) as error:
        losses.check_filled(loss, {"old_entropy": "the scoring pass"})
    text = str(error.value)
    assert text.startswith(f"loss {loss.name} reads ref_lopg, which is no input of a policy loss")
    assert "did you mean ref_logp?" in text and "old_entropy by the scoring pass" in text and "fills=('ref_lopg',)" in text
    losses.check_filled(losses.get("top_entropy", kl_coef=0.1), {})  # optional inputs are no extras
    with pytest.raises(UserError, match="needs mask, which every policy loss is given"):
        own(tmp_path, SHAPED.replace('needs=("token_reward",)', 'needs=("mask",)'))
    with pytest.raises(UserError, match=r"needs is the text 'token_reward'; write needs=\('token_reward',\)"):
        own(tmp_path, SHAPED.replace('needs=("token_reward",)', 'needs="token_reward"'))


BUILT_IN = [(name, {}) for name in losses.names()] + [
    ("grpo", options)
    for options in (
        {"kl_coef": 0.1}, {"correction": "tis"}, {"behaviour": "sampler"}, {"off_policy_threshold": 0.1},
        {"off_policy_threshold": 0.1, "off_policy_behaviour": "sampler"}, {"entropy_coef": 0.1}, {"top_entropy": 0.5},
        {"reduce": "prompt-mean"}, {"kl_coef": 0.1, "kl_estimator": "k3_unbiased"},
    )
] + [("nll", {"z_loss_coef": 0.1}), ("vespo", {"correction": "tis"}), ("gdpo", {"preset": "trl"})]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), BUILT_IN, ids=str)
def test_needs_of_built_in_losses_are_exact(name, options):
    """What is not declared changes nothing, and without any one of what is declared there is no value: in a microbatch, and
    where its rule over the whole step runs."""
    loss = losses.get(name, **options)
    everything = whole_step(tiny_inputs(loss.kind))
    if loss.kind == "sft":  # which every supervised loss multiplies by where they are given
        everything = dataclasses.replace(everything, token_weights=None)
    else:
        everything = dataclasses.replace(everything, selected=loss.select(everything) if loss.select else everything.mask)
        everything = dataclasses.replace(everything, extras=dict.fromkeys(loss.extras, everything.mask))
    assert loss.extras == {"luffy": {"expert"}, "chord": {"expert", "sampled"}}.get(name, set())
    assert loss.needs - loss.extras <= set(OPTIONAL_INPUTS[loss.kind])
    assert loss(only(everything, loss.needs))[0] == loss(everything)[0]
    for missing in loss.needs:
        less = only(everything, loss.needs - {missing})
        with pytest.raises(UserError):
            loss(less)
            loss.select(less)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logp": jnp.zeros((2, 3))}, r"PolicyInputs: every array is \[B, T\], of one shape, .* logp \(2, 3\), .*mask \(2, 2\)"),
        ({"advantages": jnp.zeros(2)}, r"advantages \(2,\)"),
        ({"mask": jnp.ones((2, 1))}, r"mask \(2, 1\)"),
        ({"extras": {"a": jnp.zeros((2, 2, 1))}}, r"extras\['a'\] \(2, 2, 1\)"),
    ],
)  # fmt: skip
def test_arrays_of_other_shapes_are_refused(changed, message):
    """Otherwise numpy's rules would spread them over each other, and a number would come out."""
    zeros = jnp.zeros((2, 2))
    inputs = losses.PolicyInputs(logp=zeros, old_logp=zeros, advantages=zeros, mask=jnp.ones((2, 2)))
    losses.get("grpo")(inputs)
    with pytest.raises(UserError, match=message):
        losses.get("grpo")(dataclasses.replace(inputs, **changed))


def test_extremes_of_ratios_are_numbers():
    """Of an empty microbatch they are neutral, of a step that trains nothing they are 1."""
    step = whole_step(tiny_inputs("policy"))
    whole = losses.get("grpo")(step)[1]
    ratios = np.exp(step.logp - step.old_logp)[np.asarray(step.mask) > 0]
    np.testing.assert_allclose([whole["ratio_min"], whole["ratio_max"]], [ratios.min(), ratios.max()], rtol=1e-6)
    empty = losses.get("grpo")(dataclasses.replace(step, mask=jnp.zeros_like(step.mask)))[1]
    assert empty["ratio_min"] == np.inf and empty["ratio_max"] == 0  # the neutral elements of minimum and maximum
    nothing = losses.get("grpo")(dataclasses.replace(step, mask=jnp.zeros_like(step.mask), totals=None))[1]
    assert nothing["ratio_min"] == nothing["ratio_max"] == 1 and all(np.isfinite(x) for x in nothing.values())


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # d = log 2 and -1
        ("k1", [-np.log(2), 1.0]), ("k2", [np.log(2) ** 2 / 2, 0.5]), ("k3", [1 - np.log(2), np.exp(-1)]),
        ("k1+", [-np.log(2), 1.0]), ("k3+", [1 - np.log(2), np.exp(-1)]), ("k3_unbiased", [1 - np.log(2), np.exp(-1)]),
    ],
)  # fmt: skip
def test_kl_as_plain_numbers(estimator, expected):
    logp = np.array([-1.0, -1.0])
    ref = logp + np.array([np.log(2), -1.0])
    found = kl.value(estimator, logp, ref)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # the loss's own forward values, at ratio 1
    inside = kl.kl(jnp.asarray([logp]), jnp.asarray([ref]), estimator, log_ratio=jnp.zeros((1, 2)))
    np.testing.assert_allclose(inside[0], expected, rtol=1e-5)


def test_kl_as_plain_numbers_is_bounded_and_known():
    assert kl.value("k1", np.zeros(1), np.full(1, -30.0), log_ratio_clamp=20.0) == 20.0
    with pytest.raises(UserError, match="kl_estimator is 'k4'; it is one of k1, k2, k3"):
        kl.value("k4", np.zeros(1), np.zeros(1))


@pytest.mark.parametrize("estimator", ["k1+", "k3+"])
def test_the_plus_forms_have_the_gradient_of_k2(estimator):
    """d/dlogp of d^2 / 2 is -d: -0.5 and 2."""
    logp = jnp.asarray([[-1.0, -1.0]])
    ref = jnp.asarray([[-0.5, -3.0]])
    grad = jax.grad(lambda x: kl.kl(x, ref, estimator, log_ratio=jnp.zeros((1, 2))).sum())(logp)
    np.testing.assert_allclose(grad, [[-0.5, 2.0]], rtol=1e-6)
