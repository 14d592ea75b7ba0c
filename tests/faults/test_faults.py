"""A few of the faults that ``scripts/faults.py`` makes by the thousand: hostile inputs, damaged files, kills, long runs."""

import random
import shutil

import fuzz
import harness
import pytest

from jaxreason import config as cfg
from jaxreason.errors import UserError

COUNTS = {"tokenizer_files_of": 12, "template": 40}  # the others: 60


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    return fuzz.Doors(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("door", fuzz.DOORS)
def test_a_hostile_input_is_one_message(door, doors):
    count = COUNTS.get(door, 60)
    refused, failed = fuzz.fuzz(doors, door, range(count))
    assert not failed
    assert 0.2 * count < refused, "inputs that are all taken test nothing"


def test_values_that_are_nested_too_deeply_are_refused(doors):
    """Found by config_values 6950: pydantic does not write what is nested 255 deep."""
    deep = "x"
    for _ in range(400):
        deep = [deep]
    with pytest.raises(UserError, match="nested more than 50 deep"):
        cfg.build(doors.bases["sft"] | {"loss": {"name": "nll", "options": {"a": deep}}})


def test_inputs_are_made_again_from_their_number():
    values = [fuzz.changed({"a": [1, {"b": "c"}], "d": 2.0}, random.Random("door 7")) for _ in range(2)]
    assert repr(values[0]) == repr(values[1])
    assert repr(values[0]) != repr(fuzz.changed({"a": [1, {"b": "c"}], "d": 2.0}, random.Random("door 8")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    harness.finished(root)
    return root


@pytest.mark.parametrize(("part", "only"), [("run", 8), ("cache", 6), ("export", 6)])
def test_damaged_files_are_named_or_harmless(part, only, root):
    folder, read = {"run": (root / "sft", harness.read_run), "cache": (root / "cache", harness.read_cache),
                    "export": (root / "export", harness.read_export)}[part]  # fmt: skip
    found = harness.damage(folder, read, only)
    assert not found.unseen and sum(found.outcomes.values()) == only
    assert found.outcomes["named"] + found.outcomes["made again"] > 0


def test_a_damage_that_is_not_seen_is_counted(root, tmp_path):
    """The harness itself: a reader that checks nothing is found out."""
    shutil.copytree(root / "cache", tmp_path / "cache")
    read = lambda cache: ({}, [path.read_bytes() for path in sorted(cache.rglob("*.npz"))])  # noqa: E731
    found = harness.damage(tmp_path / "cache", read)
    assert len([name for name in found.unseen if "index.npz" in name]) == 4


def test_what_grows_is_not_flat():
    use = harness.Use(9, 1000.0, 50, 20, 3)
    assert harness.is_flat(use, harness.Use(90, 1020.0, 52, 20, 3))
    for grown in (harness.Use(90, 1040.0, 50, 20, 3), harness.Use(90, 1000.0, 53, 20, 3), harness.Use(90, 1000.0, 50, 23, 3)):
        assert not harness.is_flat(use, grown)
