"""Checkpoints: Orbax for the arrays, and a manifest of file hashes that is written last and checked before every read.

    RUN/checkpoints/00000020/params/     Orbax; of a run with adapters these alone, and model.json names their base
                             optimizer/  Orbax
                             reference/  Orbax, of a run whose reference is refreshed
                             data.json   the data iterator's state
                             model.json  the architecture
                             manifest.json  sha256 of every file above; a step without it was never finished
                             unfinished  only while the step is written or deleted: what may be removed carries it

A reader holds a step by a lock of its manifest, and a step that is held is not deleted.
Orbax alone restores a flipped bit and reports a full disk as saved; a step exists here only once it was hashed.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxreason.errors import UserError
from jaxreason.locks import lock
from jaxreason.model import Adapter, Execution, ModelConfig, RopeScaling, lora, make_config
from jaxreason.restore import restore_tree
from jaxreason.types import TrainState, merge

MANIFEST, MODEL, UNFINISHED = "manifest.json", "model.json", "unfinished"
_NAME = re.compile("[0-9]{8,}")
_MARGIN = 1.02  # metadata in addition to the arrays

# Orbax logs a failed save with its traceback, and then raises it: :func:`_failed` says it in one line.
logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.WARNING and not record.exc_info)


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights that a checkpoint of adapters does not hold."""

    path: str
    digest: str | None


def write_json(path: Path, value: Any) -> None:
    """Writes atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def model_to_json(config: ModelConfig) -> dict:
    """The family, its architecture, its adapters and the dtype of its weights, as plain values; how a run ran it is not part."""
    values = {"family": config.arch.family, **vars(config.arch), "param_dtype": config.execution.param_dtype}
    if config.adapter:
        values["adapter"] = vars(config.adapter) | {"targets": list(config.adapter.targets)}
    if config.arch.rope_scaling:
        values["rope_scaling"] = dict(vars(config.arch.rope_scaling))
    return values | {"stop_ids": list(config.arch.stop_ids)}


def read_model(step_dir: Path) -> ModelConfig:
    """The model of a checkpoint, without its adapters (:func:`read_adapters`).

    Raises UserError where another version wrote what this one does not know.

    Checkpoints from before there were families name none: they are Llamas. Older ones also hold how they were run, which is
    left out: a bound on segments that fitted one run's rows would refuse another's.
    """
    path = step_dir / MODEL
    values = _model_values(step_dir, path)
    for name in {*Execution.__dataclass_fields__, "adapter", "base"} - {"param_dtype"}:
        values.pop(name, None)
    try:
        scaling = values.get("rope_scaling")
        values["rope_scaling"] = RopeScaling(**scaling) if scaling else None
        return make_config(**values | {"stop_ids": tuple(values.get("stop_ids", ()))})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} describes a model that this version does not have: {error}") from None


def read_adapters(step_dir: Path) -> tuple[Adapter, Base] | None:
    """The adapters that a checkpoint holds, and what they stand beside; None for one that holds the whole model."""
    path = step_dir / MODEL
    values = _model_values(step_dir, path)
    if values.get("adapter") is None:
        return None
    try:
        adapter = Adapter(**values["adapter"] | {"targets": tuple(values["adapter"]["targets"])})
        return adapter, Base(**values["base"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} describes adapters that this version does not have: {error}") from None


def _model_values(step_dir: Path, path: Path) -> dict:
    """model.json as it was sealed. Raises UserError where it is missing, damaged or not what the manifest lists."""
    fix = f"use another step (there are {steps(step_dir.parent)}), or delete {step_dir}"
    try:
        content = path.read_bytes()
        if (step_dir / MANIFEST).is_file():
            listed = json.loads((step_dir / MANIFEST).read_bytes())["files"][MODEL]["sha256"]
            if listed != hashlib.sha256(content).hexdigest():
                raise UserError(f"{path}: its content is not what was saved (sha256 differs); {fix}")
        return dict(json.loads(content))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read, or the {MANIFEST} next to it: {type(error).__name__}: {error}; {fix}") from None


def steps(directory: Path) -> list[int]:
    """Finished steps, oldest first."""
    found = (path.parent for path in directory.glob(f"*/{MANIFEST}"))
    ours = (path for path in found if _NAME.fullmatch(path.name) and any((path / part).exists() for part in (MODEL, "params")))
    return sorted(int(path.name) for path in ours)


def unfinished(directory: Path) -> list[Path]:
    """Directories of steps whose writing, or whose deletion, was cut off: they say so themselves."""
    found = (path.parent for path in directory.glob(f"*/{UNFINISHED}") if _NAME.fullmatch(path.parent.name))
    return sorted(path for path in found if not (path / MANIFEST).exists())


def hold(step_dir: Path) -> IO | None:
    """Keeps a step from being deleted for as long as what is returned is open; None if the step is not there."""
    try:
        file = open(step_dir / MANIFEST)
    except FileNotFoundError:
        return None
    # It may have been deleted between the two: its writer locks the manifest before it unlinks it.
    if lock(file, exclusive=False) is not False and (step_dir / MANIFEST).exists():
        return file
    file.close()
    return None


def _begin(step_dir: Path) -> None:
    """Makes a step's directory, which says that it is not finished. Raises UserError where there is one that is not ours."""
    with contextlib.suppress(OSError):
        step_dir.rmdir()  # an empty one is nobody's loss
    if step_dir.exists() and not _remove(step_dir):
        raise UserError(
            f"{step_dir} is in the way of this run's checkpoint, and it is not one of ours, or it is being read: move it away"
        )
    step_dir.mkdir(parents=True, exist_ok=True)
    (step_dir / UNFINISHED).write_text("jaxreason writes or deletes this step; if it was cut off, the next run removes it\n")


def _remove(step_dir: Path) -> bool:
    """Deletes a step of ours, unless a reader holds it; whether it is gone."""
    if step_dir in unfinished(step_dir.parent):
        _clear(step_dir)
        return True
    if int(step_dir.name) not in steps(step_dir.parent):
        return False
    with open(step_dir / MANIFEST, "r+") as file:
        if lock(file, exclusive=True) is False:
            return False
        # The manifest goes first: a deletion cut short leaves an unfinished step, not a damaged one.
        (step_dir / UNFINISHED).touch()
        (step_dir / MANIFEST).unlink()
    _clear(step_dir)
    return True


def _clear(step_dir: Path) -> None:
    """Deletes a directory, its mark last: what a kill leaves of it is still known for ours."""
    for part in step_dir.iterdir():
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        elif part.name != UNFINISHED:
            part.unlink()
    shutil.rmtree(step_dir)


def _files(step_dir: Path) -> list[Path]:
    names = (MANIFEST, UNFINISHED)
    return sorted(p for p in step_dir.rglob("*") if p.is_file() and p.name not in names and not p.name.endswith(".tmp"))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(step_dir: Path, files: list[Path]) -> dict[str, dict]:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(_digest, files))
    return {str(p.relative_to(step_dir)): {"sha256": h, "bytes": p.stat().st_size} for p, h in zip(files, hashes)}


def verify(step_dir: Path) -> dict:
    """Checks every file of a step against its manifest and returns it. Raises UserError naming the first bad file."""
    path = step_dir / MANIFEST
    if not path.is_file():
        others = f"the finished steps are {steps(step_dir.parent) or 'none'}"
        raise UserError(f"{step_dir}: no {MANIFEST}: it is being written or deleted, or that was cut off; {others}")
    try:
        return _verified(step_dir, path)
    except (UserError, FileNotFoundError):
        if path.is_file():
            raise
        raise UserError(
            f"{step_dir} was deleted while it was read: its run goes on, and keeps its newest steps; run the same command again"
        ) from None


def _verified(step_dir: Path, path: Path) -> dict:
    fix = f"delete {step_dir} to go on from the step before it"
    try:
        listed = json.loads(path.read_bytes())["files"]
        if not all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in listed.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a readable manifest; {fix}") from None
    present = [step_dir / name for name in listed if (step_dir / name).is_file()]
    for name, entry in listed.items():
        if not (step_dir / name).is_file():
            raise UserError(f"{step_dir / name}: missing; the checkpoint is damaged; {fix}")
        if (found := (step_dir / name).stat().st_size) != entry["bytes"]:
            raise UserError(f"{step_dir / name}: {found} bytes, not {entry['bytes']}; the checkpoint is damaged; {fix}")
    for name, entry in _digests(step_dir, present).items():
        if entry["sha256"] != listed[name]["sha256"]:
            raise UserError(f"{step_dir / name}: its content is not what was saved (sha256 differs); {fix}")
    return listed


def _verify_once(step_dir: Path) -> None:
    """:func:`verify` by one process for all: the others need not read every file too."""
    if jax.process_count() == 1:
        verify(step_dir)
        return
    error = None
    if jax.process_index() == 0:
        try:
            verify(step_dir)
        except UserError as found:
            error = found
    if not multihost_utils.broadcast_one_to_all(np.array(error is None)):
        raise error or UserError(f"{step_dir} is damaged; process 0 says where")


def stored_params(state: TrainState, model: ModelConfig) -> dict:
    """What a checkpoint holds of the model: all of it, or its adapters alone, with where they began if PiSSA made them."""
    return _held(state) if model.adapter else state.model_params


def _held(state: TrainState) -> dict:
    return merge(state.params, lora.split(state.frozen)[1])


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, whose failures :meth:`check` raises, and verified restores."""

    def __init__(self, directory: str | Path, keep: int, base: Base | None = None):
        """``base``: of a run with adapters."""
        self._base = base
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._savers: dict[str, ocp.StandardCheckpointer] = {}  # by the directory that each writes
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    def remove_unfinished(self) -> list[Path]:
        """Deletes what a killed save left behind and says which."""
        cut = unfinished(self.directory)
        if jax.process_index() == 0:
            for path in cut:
                _clear(path)
        return cut

    def save(
        self, state: TrainState, data_state: dict, model: ModelConfig, more: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Starts writing ``state`` under its step; returns once the device arrays may be changed again.

        ``more``: further trees of arrays, each by the name of its directory.

        Raises UserError if an earlier save failed or the disk lacks the room.
        """
        self.wait()
        step = int(state.step)
        path = self.directory / f"{step:08d}"
        self.directory.mkdir(parents=True, exist_ok=True)
        params = stored_params(state, model)
        size = sum(x.nbytes for x in jax.tree.leaves((params, state.opt_state, dict(more))))
        free = shutil.disk_usage(self.directory).free
        if free < size * _MARGIN:
            raise UserError(
                f"checkpoint of step {step}: needs {size / 2**30:.2f} GiB in {self.directory}, {free / 2**30:.2f} GiB "
                "are free; make room, lower train.keep_checkpoints, or set run.dir to another disk"
            )
        if jax.process_index() == 0:
            _begin(path)
        try:
            trees = {"params": params, "optimizer": {"opt_state": state.opt_state}, **more}
            for name, tree in trees.items():
                if name not in self._savers:  # each has threads of its own, and is used for every step
                    self._savers[name] = ocp.StandardCheckpointer()
                self._savers[name].save(path / name, tree)
        except (OSError, ValueError) as error:
            _wait_for(self._savers.values())
            raise _failed(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(step, path, data_state, model), daemon=True)
        self._thread.start()

    def _finish(self, step: int, path: Path, data_state: dict, model: ModelConfig) -> None:
        try:
            if failed := _wait_for(self._savers.values()):
                raise failed[0]
            if jax.process_index() == 0:
                write_json(path / "data.json", data_state)
                _seal(path, model, self._base)
                for old in steps(self.directory)[: -self.keep]:
                    _remove(self.directory / f"{old:08d}")
        except BaseException as error:
            self._failure = (step, error)

    def check(self) -> None:
        """Raises UserError if the save under way, or the last one, failed."""
        if self._failure:
            step, error = self._failure
            raise _failed(step, error) from error

    def wait(self) -> None:
        """Blocks until the save under way is finished and hashed; raises like :meth:`check`."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def restore(
        self, step: int, abstract: TrainState, base: Callable[[dict], dict] | None = None
    ) -> tuple[TrainState, dict]:
        """The verified state of a step, on the shardings of ``abstract``, and the data iterator's state.

        ``base``: of a run with adapters, whose checkpoint does not hold what they stand beside: makes it, given where PiSSA's
        adapters began.
        """
        path = self.directory / f"{step:08d}"
        _verify_once(path)
        params = restore_tree(path / "params", _held(abstract) if base else abstract.model_params)
        opt_state = restore_tree(path / "optimizer", {"opt_state": abstract.opt_state})["opt_state"]
        place = getattr(abstract.step, "sharding", None)
        count = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), place)
        trained = _part(params, abstract.params)
        frozen = base(lora.split(params)[1]) if base else _part(params, abstract.frozen)
        return TrainState(count, trained, frozen, opt_state), json.loads((path / "data.json").read_text())

    def restore_more(self, step: int, name: str, abstract: Any) -> Any:
        """What was saved as ``more[name]`` with a step that :meth:`restore` has verified, on the shardings of ``abstract``."""
        return restore_tree(self.directory / f"{step:08d}" / name, abstract)


def _wait_for(savers: Iterable[ocp.StandardCheckpointer]) -> list[BaseException]:
    """Waits for every saver, and returns what failed: one that is left alone would keep Python from ending."""
    failed: list[BaseException] = []
    for saver in savers:
        try:
            saver.wait_until_finished()
        except BaseException as error:  # handed to the caller
            failed.append(error)
    return failed


def _part(params: dict, like: dict) -> dict:
    """The leaves of ``params`` that ``like`` has too."""
    return {key: _part(params[key], value) if isinstance(value, dict) else params[key] for key, value in like.items()}


def _seal(step_dir: Path, model: ModelConfig, base: Base | None = None) -> None:
    """Writes the architecture and, last, the manifest: from here on the step exists."""
    write_json(step_dir / MODEL, model_to_json(model) | ({"base": vars(base)} if model.adapter and base else {}))
    write_json(step_dir / MANIFEST, {"step": int(step_dir.name), "files": _digests(step_dir, _files(step_dir))})
    (step_dir / UNFINISHED).unlink(missing_ok=True)


def save_params(directory: Path, params: dict, model: ModelConfig) -> None:
    """A checkpoint of step 0 with weights alone: what a converted model is to this project."""
    path = directory.absolute() / f"{0:08d}"
    with ocp.StandardCheckpointer() as saver:
        saver.save(path / "params", params)
    _seal(path, model)


def _failed(step: int, error: BaseException) -> UserError:
    cause = str(error).strip().splitlines()
    return UserError(
        f"checkpoint of step {step} could not be written: {type(error).__name__}: {cause[0] if cause else ''}; "
        "free disk space or fix the directory's permissions, then run the same command to go on from the step before it"
    )
