"""What runs are measured on: the same problems whatever the seed, and none of those that are trained."""

from jaxreason import config as cfg
from jaxreason.rl.grpo import open_inputs
from jaxreason.train.setup import held_out_problems


def texts(seed: int) -> tuple[list[str], list[str]]:
    """Held-out and trained problems of the embedded task."""
    words = ["model.weights=null", "model.preset=embedded-tiny", "eval.problems=20", "data.max_rows=200"]
    config = cfg.load("grpo", [*words, f"run.seed={seed}"])
    assert isinstance(config, cfg.GrpoConfig)
    inputs = open_inputs(config)
    found = held_out_problems(config, inputs.setup, inputs.chat)
    assert found is not None
    return [found[i].text for i in range(len(found))], [inputs.prompts[i].text for i in range(len(inputs.prompts))]


def test_every_seed_is_measured_on_the_same_problems():
    (held_out, trained), (again, others) = texts(0), texts(7)
    assert held_out == again and len(set(held_out)) == 20
    assert trained != others
    assert not set(held_out) & (set(trained) | set(others))
