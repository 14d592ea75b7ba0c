"""Several processes as one run: how they find each other, and that two train what one trains."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import final_params, grpo_words, sft_words

from jaxreason import checkpoint, cli, distributed
from jaxreason.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
GPUS8 = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


# ---- finding each other


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # a batch script's own process, or a shell in an allocation
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.9"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.9", "JOB_COMPLETION_INDEX": "3", "JAX_NUM_PROCESSES": "1"},
    ],
)
def test_a_process_on_its_own_joins_nothing(environment):
    assert distributed.detect(environment=environment) is None


def test_flags_and_variables_name_the_same():
    by_flags = distributed.detect("host:1234", 4, 3, environment=SLURM)
    names = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    by_name = distributed.detect(environment=names | SLURM)
    assert dict(by_flags.join) == dict(by_name.join) == {
        "coordinator_address": "host:1234", "num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate",
    }  # fmt: skip


def test_skypilot_counts_its_nodes():
    found = distributed.detect(environment={"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"})
    assert found.processes == 2 and found.join["process_id"] == 1
    assert found.join["coordinator_address"].startswith("10.0.0.1:")


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        (GPUS8, list(range(8))),  # one task a node takes all
        (GPUS8 | {"SLURM_STEP_TASKS_PER_NODE": "4(x1)", "SLURM_LOCALID": "1"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "5", "SLURM_STEP_TASKS_PER_NODE": "4(x1)", "SLURM_LOCALID": "3"}, [0]),  # bound by Slurm
    ],
)
def test_slurm_shares_a_node_s_gpus_among_its_tasks(changes, devices):
    found = distributed.detect(environment=SLURM | changes)
    assert found.processes == 4 and found.join["local_device_ids"] == devices


@pytest.mark.parametrize(
    ("arguments", "environment", "parts"),
    [
        (("host:1", None, None), {}, ["--coordinator", "without --num-processes and --process-id"]),
        (("host:1", 2, 2), {}, ["--process-id is 2", "between 0 and 1"]),
        (("host", 2, 0), {}, ["--coordinator", "HOST:PORT"]),
        ((), {"JAX_PROCESS_ID": "0"}, ["JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"]),
        ((), {"JAX_COORDINATOR_ADDRESS": "host:1"}, ["without JAX_NUM_PROCESSES and JAX_PROCESS_ID"]),
        ((), {"SKYPILOT_NODE_IPS": "a b"}, ["SKYPILOT_NODE_RANK"]),
        ((), {"SKYPILOT_NODE_IPS": "a b", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "3"}, ["is 3 and", "lists 2"]),
        ((), {k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, ["SLURM_LOCALID is ''"]),
        ((), SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ["3 GPUs", "2 processes"]),
        ((), {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, ["launch/kubernetes.yaml", "JAX_NUM_PROCESSES=1"]),
    ],
)  # fmt: skip
def test_half_a_description_is_refused(arguments, environment, parts):
    with pytest.raises(UserError) as error:
        distributed.detect(*arguments, environment=environment)
    assert all(part in str(error.value) for part in parts)


def test_gpus_are_counted_without_starting_one():
    assert distributed.local_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    assert distributed.local_gpus({"CUDA_VISIBLE_DEVICES": ""}) == distributed.local_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


# ---- two processes on this machine, over gloo


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(config: str, *words: str, numbers=(0, 1), each=((), ())) -> list[subprocess.Popen]:
    """Those of two processes of train.py, with two devices each; ``each``: words for one of them."""
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", config, *words, *each[k], "--coordinator",
             f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(k)],
            cwd=ROOT, env=flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for k in numbers
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    out = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, out)]


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, two: Path, names: tuple[str, ...]) -> None:
    straight, shared = metrics_of(one), metrics_of(two)
    assert [line["step"] for line in shared] == [line["step"] for line in straight]
    for a, b in zip(straight, shared):
        for name in names:
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (a["step"], name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), final_params(one), final_params(two))


def test_two_processes_train_what_one_trains(tmp_path):
    """Each of the two reads half of every batch; the metrics, the parameters and the writer are those of one."""
    words = sft_words(tmp_path, "train.steps=4", "eval.problems=8", "eval.max_completion_tokens=8", "data.eval_rows=8")
    results = finish(start("sft", *words, "run.name=two"))
    assert [code for code, _, _ in results] == [0, 0], results
    assert "2 processes (flags)" in results[0][1] and "on 8 held-out problems" in results[0][1]
    # Gloo's threads write over each other, so that a line of theirs may come in pieces, an empty one among them; what the run
    # itself says has whole lines, borders of tables for one, and the second process says none of them.
    said = [{line for line in text.splitlines() if line.strip() and "peer ranks" not in line} for _, text, _ in results]
    assert any("on 8 held-out problems" in line for line in said[0]) and not said[0] & said[1]
    assert cli.train(["--config", "sft", *words, "run.name=one"]) == 0
    assert_same_training(tmp_path / "one", tmp_path / "two", ("loss", "grad_norm", "tokens", "eval_loss", "eval_accuracy"))


def test_two_processes_draw_grade_and_train_what_one_does(tmp_path):
    words = grpo_words(tmp_path, "train.steps=2")
    results = finish(start("grpo", *words, "run.name=two"))
    assert [code for code, _, _ in results] == [0, 0], results
    assert cli.train(["--config", "grpo", *words, "run.name=one"]) == 0
    names = ("reward", "reward_std", "completion_tokens", "zero_std_fraction", "loss", "grad_norm", "tokens")
    assert_same_training(tmp_path / "one", tmp_path / "two", names)


def test_a_signal_to_one_stops_both_after_the_same_step_and_one_process_goes_on(tmp_path):
    words = sft_words(tmp_path, "train.steps=100", "run.name=stopped")
    processes = start("sft", *words)
    log = tmp_path / "stopped" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [cli.STOPPED, cli.STOPPED], results
    (step,) = checkpoint.steps(tmp_path / "stopped" / "checkpoints")
    assert step == metrics_of(tmp_path / "stopped")[-1]["step"] < 100
    assert cli.train(["--config", "sft", *words]) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "stopped")] == list(range(1, 101))


@pytest.mark.parametrize(("number", "reason"), [(0, "the others did not all come"), (1, "process 0 was not reached")])
def test_a_process_that_stays_alone_says_so(number, reason, tmp_path):
    """jax itself would abort it with a C++ stack trace."""
    ((code, _, error),) = finish(start("sft", *sft_words(tmp_path), "--connect-timeout", "2", numbers=(number,)))
    assert code == 2
    assert error.startswith(f"process {number}: error: cannot join the other processes (flags: process {number} of 2 at 127")
    assert f"{reason} within 2 s" in error and len(error.splitlines()) == 1


def test_processes_that_differ_end_at_once_and_each_says_so(tmp_path):
    """Left to itself, a failing process would wait in jax's last barrier for the other, which waits for it."""
    processes = start("sft", *sft_words(tmp_path), each=(("train.steps=4",), ("train.steps=5",)))
    for number, (code, _, error) in enumerate(finish(processes)):
        assert code == 2, error
        assert f"process {number}: error: the processes differ: this one finds checkpoint none and {4 + number} steps" in error
    assert not (tmp_path / "sft").exists()


def test_kubernetes_is_left_to_jax_where_its_package_is_there(monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: name)
    found = distributed.detect(environment={"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "3"})
    assert found.process == 3 and found.join == {}  # jax 0.10 and 0.12 know no method of that name


def test_open_mpi_is_left_to_jax_where_it_says_its_address():
    four = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"), "8341")}
    found = distributed.detect(environment=four | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"} | GPUS8)
    assert (found.processes, found.process) == (8, 3) and found.join["local_device_ids"] == [2, 3]
    with pytest.raises(UserError, match="as version 5 no longer does"):
        distributed.detect(environment=four)
