"""Slots by hand for a card of given memory, and a train state that waits in host memory while completions are drawn."""

import jax
import numpy as np
import pytest
from helpers import final_params, grpo_words

from jaxreason import cli
from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.model import PRESETS
from jaxreason.rl.collect import slots_of
from jaxreason.sampler.engine.slots import Room, room_here
from jaxreason.sharding import make_mesh, replicated
from jaxreason.train.offload import Shelf

GIB = 2**30
LLAMA_3B = PRESETS["llama3.2-3b"].replace(compute_dtype="bfloat16")


def settled(room: Room, *words: str) -> int:
    config = cfg.load("grpo", ["rollout.slots=auto", "rollout.prompts_per_step=64", "rollout.group_size=8", *words])
    assert isinstance(config, cfg.GrpoConfig)
    return slots_of(config, LLAMA_3B, 512, room)


def test_slots_are_what_is_left_over_what_one_takes():
    words = ("rollout.max_completion_tokens=2048",)
    # a slot: 2,560 positions x 114,688 bytes and three float32 arrays over 128,256 tokens; beside the slots 3,212,749,824
    # weights in bfloat16, a prefill of 8 prompts of 512 positions and a GiB
    one, taken = 2560 * 114_688 + 12 * 128_256, 2 * 3_212_749_824 + 8 * 512 * 114_688 + GIB
    room = Room(taken + 24 * GIB + 17 * one, 24 * GIB, 1, 1)
    assert settled(room, *words) == 16  # 17 fit, and 16 is a multiple of eight
    assert settled(Room(room.limit_bytes, 0, 1, 1), *words) == (17 + 24 * GIB // one) // 8 * 8 == 104
    assert settled(Room(taken + 7 * one, 0, 4, 2), *words) == 7 * 8  # every device of every process has as many
    assert settled(Room(900 * GIB, 0, 1, 1), *words) == 64 * 8  # never more than sequences
    assert settled(room, *words, "rollout.slots=5") == 5
    with pytest.raises(UserError, match=r"not one sequence of 2560 positions .* rollout.offload_state=true"):
        settled(Room(taken + one - 1, 0, 1, 1), *words)


def test_this_machines_room_is_half_of_its_memory():
    here, total = room_here(7), int(open("/proc/meminfo").readline().split()[1]) * 1024
    assert here.resident_bytes == 7 and here.devices == jax.local_device_count() and here.processes == 1
    assert here.limit_bytes * here.devices == pytest.approx(total / 2, rel=0.01)


def test_a_state_on_the_shelf_is_on_the_host_and_comes_back_as_it_was():
    state = {"w": jax.device_put(np.arange(16.0), replicated(make_mesh(cfg.Mesh())))}
    shelf = Shelf(state, offload=True)
    away = shelf.put(state)
    assert away["w"].sharding.memory_kind == "pinned_host" and shelf.seconds["offload"] > 0
    back = shelf.take(away)
    assert back["w"].sharding == state["w"].sharding
    np.testing.assert_array_equal(back["w"], state["w"])
    assert Shelf(state, offload=False).put(state) is state and Shelf(state, offload=False).take(state) is state


def test_a_run_whose_state_waits_on_the_host_and_whose_slots_are_found_ends_bitwise_equal(tmp_path):
    ends = []
    for name, words in (("here", ()), ("away", ("rollout.offload_state=true", "rollout.slots=auto"))):
        assert cli.train(["--config", "grpo", *grpo_words(tmp_path / name, "train.steps=2", *words)]) == 0
        ends.append(jax.tree.leaves(final_params(tmp_path / name / "grpo")))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)
