"""The launch files: they parse, name configs and words that exist, and ask for rows that their devices can share."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxreason import config as cfg
from jaxreason import distributed
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


def test_kubernetes():
    service, job = yaml.safe_load_all((ROOT / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["command"], job["spec"]["completions"], container["resources"]["limits"]["nvidia.com/gpu"])
    environment = {one["name"]: one.get("value", "3") for one in container["env"]}
    found = distributed.detect(environment={**environment, "KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "3"})
    assert found.processes == job["spec"]["parallelism"] == 4 and found.join["process_id"] == 3
    name = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert found.join["coordinator_address"].startswith(name) and pod["subdomain"] == service["metadata"]["name"]
