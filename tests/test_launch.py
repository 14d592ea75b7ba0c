"""The launch files: they parse, name configs and words that exist, and ask for rows that their devices can share."""

import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxreason import cli, distributed
from jaxreason import config as cfg
from jaxreason.plan.options import Options, fit_batch

ROOT = Path(__file__).resolve().parents[1] / "launch"
SKY = sorted(ROOT.glob("skypilot-*.yaml"))


def check_command(command: list[str], hosts: int, devices: int) -> None:
    """A command of train.py: its config loads, whole rows come to every device and whole groups to every host."""
    words = command[command.index("scripts/train.py") + 1 :]
    assert words[0] == "--config"
    assert fit_batch(words[1], words[2:], Options(hosts=hosts, devices=devices))[1] == []


@pytest.mark.parametrize("path", SKY, ids=lambda p: p.stem)
def test_skypilot(path):
    task = yaml.safe_load(path.read_text())
    nodes, gpus = (int(n) for n in re.fullmatch(r"skypilot-(\d)x(\d)", path.stem).groups())
    recovery = task["resources"]["job_recovery"]
    assert cli.STOPPED in recovery["recover_on_exit_codes"] and 2 not in recovery["recover_on_exit_codes"]
    assert {"HF_TOKEN", "WANDB_API_KEY"} <= task["secrets"].keys()
    # A cached mount shows other nodes late what one has written: such a run would not start.
    assert task["file_mounts"]["/runs"]["mode"] == ("MOUNT" if nodes > 1 else "MOUNT_CACHED")
    assert task["num_nodes"] == nodes and task["resources"]["accelerators"] == f"H100:{gpus}"
    after = re.findall(r"^#   (exec .*train\.py.*)$", path.read_text(), re.M)
    lines = [line for line in [*task["run"].splitlines(), *after] if "train.py" in line]
    assert [re.search(r"--config (\S+)", line)[1] for line in lines] == ["llama3.2-3b/sft", "llama3.2-3b/grpo"]
    for line in lines:
        check_command(shlex.split(line), nodes, gpus)
        assert "run.dir=/runs" in line and "/runs" in task["file_mounts"]
    sft, grpo = (cfg.load(words[4], words[5:]) for words in map(shlex.split, lines))
    assert grpo.model.weights == f"{sft.run.dir}/{sft.run.name}"


def test_there_is_a_file_for_each_size():
    assert [path.stem for path in SKY] == ["skypilot-1x1", "skypilot-1x8", "skypilot-4x8"]


def test_slurm():
    path = ROOT / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("TERM@")
    examples = re.findall(r"^#     sbatch (.*?)launch/slurm.sbatch ?(.*)$", text, re.M)
    sizes = []
    for changes, words in examples:
        chosen = options | dict(re.findall(r"--([\w-]+)=(\S+)", changes))
        config = chosen.get("export", "CONFIG=llama3.2-3b/sft").partition("CONFIG=")[2]
        sizes.append((config, int(chosen["nodes"]), int(chosen["gpus-per-node"])))
        check_command(["scripts/train.py", "--config", config, *words.split()], *sizes[-1][1:])
    assert sizes == [(f"llama3.2-3b/{kind}", *size) for kind in ("sft", "grpo") for size in ((1, 8), (4, 8), (1, 1))]


@pytest.mark.parametrize(("srun", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_puts_a_job_back_that_was_told_to_stop(srun, requeued, tmp_path):
    """With stand-ins for Slurm's commands; SIGTERM reaches the batch script too, which must live until srun has ended."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, text in {
        "srun": f'echo "$@" > {tmp_path}/asked; kill -TERM $PPID; sleep 0.2; exit {srun}',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41"}
    done = subprocess.run(["bash", ROOT / "slurm.sbatch", "train.steps=3"], env=environment, check=False)
    assert done.returncode == srun and (tmp_path / "requeued").exists() is requeued
    assert "--config llama3.2-3b/sft train.steps=3" in (tmp_path / "asked").read_text()
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 41\n"


def check_policy(job: dict) -> None:
    """Told to stop: tried again and not counted. An error that a person mends: not tried again."""
    rules = job["podFailurePolicy"]["rules"]
    actions = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert actions == {2: "FailJob", cli.STOPPED: "Ignore", 128 + signal.SIGTERM: "Ignore"}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes takes a policy of pod failures with nothing else
    names = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
    assert names == {pod["containers"][0]["name"]}
    secrets = {one["name"]: one["valueFrom"] for one in pod["containers"][0]["env"] if "secretKeyRef" in one.get("valueFrom", {})}
    assert secrets.keys() == {"HF_TOKEN", "WANDB_API_KEY"} and all(s["secretKeyRef"]["optional"] for s in secrets.values())


def test_jobset():
    jobset = yaml.safe_load((ROOT / "jobset.yaml").read_text())
    _, job = yaml.safe_load_all((ROOT / "kubernetes.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    check_policy(spec)
    assert jobset["spec"]["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (container,), (alone,) = spec["template"]["spec"]["containers"], job["spec"]["template"]["spec"]["containers"]
    assert container | {"env": 0} == alone | {"env": 0} and spec["completions"] == job["spec"]["completions"]
    host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert container["env"][0] == {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{host}:8476"}


def test_dockerfile():
    """What it copies is here, and what the commands of the launch files need is copied."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert all((ROOT.parent / name).exists() for name in copied)
    assert {"scripts", "configs", "jaxreason", "pyproject.toml"} <= copied
    assert "WORKDIR /jaxreason" in lines and any(".[cuda13,math]" in line for line in lines)


def test_kubernetes():
    service, job = yaml.safe_load_all((ROOT / "kubernetes.yaml").read_text())
    check_policy(job["spec"])
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["command"], job["spec"]["completions"], container["resources"]["limits"]["nvidia.com/gpu"])
    environment = {one["name"]: one.get("value", "3") for one in container["env"]}
    found = distributed.detect(environment={**environment, "KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "3"})
    assert found.processes == job["spec"]["parallelism"] == 4 and found.join["process_id"] == 3
    name = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert found.join["coordinator_address"].startswith(name) and pod["subdomain"] == service["metadata"]["name"]
