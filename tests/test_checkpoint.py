"""Checkpoints: bitwise round trip, manifests that catch every damage, failures that surface at their step."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxreason import checkpoint, model
from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.sharding import make_mesh
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.types import TrainState

CONFIG = model.make_config(
    vocab_size=64, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    rope_scaling=model.RopeScaling("llama3", 32.0), stop_ids=(3, 5),
)  # fmt: skip
OPTIMIZER = opt.make(cfg.Optimizer(), 10)


def fresh(step: int) -> TrainState:
    state = states.create(CONFIG, OPTIMIZER, make_mesh(cfg.Mesh(), jax.devices()[:1]), seed=step)
    return dataclasses.replace(state, step=state.step + step)


@pytest.fixture
def saved(tmp_path):
    store = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        store.save(fresh(step), {"next": step}, CONFIG)
    store.wait()
    return store


def test_round_trip_is_bitwise_and_old_steps_go(saved):
    assert checkpoint.steps(saved.directory) == [2, 3]
    state, data = saved.restore(3, states.abstract(CONFIG, OPTIMIZER, make_mesh(cfg.Mesh(), jax.devices()[:1])))
    jax.tree.map(np.testing.assert_array_equal, state, fresh(3))
    assert data == {"next": 3}


def test_savers_are_made_once(tmp_path, monkeypatch):
    """Each of Orbax's keeps threads: one for each directory of a step, however many steps are saved."""
    made, real = [], checkpoint.ocp.StandardCheckpointer
    monkeypatch.setattr(checkpoint.ocp, "StandardCheckpointer", lambda: made.append(real()) or made[-1])
    store = checkpoint.Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        store.save(fresh(step), {}, CONFIG, {"reference": fresh(step).params})
        store.wait()
    assert len(made) == 3 and checkpoint.steps(tmp_path) == [3]


def test_a_deletion_cut_short_leaves_no_finished_step(saved, monkeypatch):
    """Killed while the files of step 2 go: what is left of it must not pass for a checkpoint."""

    def killed(path, *args, **options):
        (path.parent / "data.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    saved.save(fresh(4), {"next": 4}, CONFIG)
    saved._thread.join()
    assert checkpoint.steps(saved.directory) == [3, 4]
    assert [path.name for path in checkpoint.unfinished(saved.directory)] == ["00000002"]


def test_architecture_round_trip(tmp_path):
    def read(values):
        (tmp_path / "model.json").write_text(json.dumps(values))
        return checkpoint.read_model(tmp_path)

    written = checkpoint.model_to_json(CONFIG)
    assert read(written) == CONFIG
    assert read({key: value for key, value in written.items() if key != "family"}) == CONFIG  # from before families
    # A run's bound on segments, its remat and its loops are that run's: an older file that has them opens without them.
    assert read(written | {"max_segments": 8, "remat": "full", "scan_layers": False}) == CONFIG
    run_as = CONFIG.replace(max_segments=8, remat="full", scan_layers=False, param_dtype="bfloat16")
    assert read(checkpoint.model_to_json(run_as)) == CONFIG.replace(param_dtype="bfloat16")
    for wrong in ({"family": "mamba"}, {"num_experts": 8}):
        with pytest.raises(UserError, match=next(iter(wrong.values())) if "family" in wrong else "num_experts"):
            read(written | wrong)


def test_every_flipped_bit_is_caught(saved):
    """Orbax restores a flipped bit without a word; one flip in each file of the step must be refused, by name."""
    step_dir = saved.directory / "00000003"
    names = list(checkpoint.verify(step_dir))
    assert any("params" in n for n in names) and any("optimizer" in n for n in names) and "data.json" in names
    for name in names:
        path = step_dir / name
        content = path.read_bytes()
        if not content:
            continue
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=path.name.replace("$", r"\$")):
            checkpoint.verify(step_dir)
        path.write_bytes(content)
    checkpoint.verify(step_dir)


def test_cut_short_and_missing_files_are_named(saved):
    step_dir = saved.directory / "00000003"
    big = max((step_dir / n for n in checkpoint.verify(step_dir)), key=lambda p: p.stat().st_size)
    content = big.read_bytes()
    big.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{len(content) - 1} bytes, not {len(content)}"):
        checkpoint.verify(step_dir)
    big.unlink()
    with pytest.raises(UserError, match="missing; the checkpoint is damaged; delete"):
        checkpoint.verify(step_dir)


def test_a_step_without_manifest_does_not_exist(saved):
    (saved.directory / "00000003" / checkpoint.MANIFEST).unlink()
    assert checkpoint.steps(saved.directory)[-1] == 2
    assert saved.remove_unfinished() == []  # it does not say that this project may delete it
    (saved.directory / "00000003" / checkpoint.UNFINISHED).touch()
    assert saved.remove_unfinished() == [saved.directory / "00000003"]
    assert not (saved.directory / "00000003").exists()


def test_a_failed_save_is_an_error_that_names_its_step(saved, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_digests", full)
    saved.save(fresh(4), {}, CONFIG)
    with pytest.raises(UserError, match="checkpoint of step 4 could not be written: OSError.*No space left"):
        saved.wait()
    assert checkpoint.steps(saved.directory)[-1] == 3


def test_too_little_disk_is_said_before_writing(saved, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="checkpoint of step 5: needs .* GiB in .*; make room"):
        saved.save(fresh(5), {}, CONFIG)
    assert not (saved.directory / "00000005").exists()


def test_another_architecture_is_refused(saved):
    other = states.abstract(CONFIG.replace(mlp_dim=32), OPTIMIZER, make_mesh(cfg.Mesh(), jax.devices()[:1]))
    with pytest.raises(UserError, match=r"mlp.\w+.kernel is \(2, .* in this run's model"):
        saved.restore(3, other)
