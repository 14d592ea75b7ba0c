"""Several processes as one run: who we are among them, and joining jax's distributed runtime before a device starts.

Looked for in this order: flags of train.py, ``JAX_COORDINATOR_ADDRESS`` with ``JAX_NUM_PROCESSES`` and
``JAX_PROCESS_ID``, SkyPilot, Slurm, Open MPI, Kubernetes (an Indexed Job). Finding one process, or nothing, joins nothing.

jax's runtime answers what goes wrong by C++ stack traces and by waiting, for minutes, for processes that will not come.
``start`` and ``joined`` stand between it and the user: one sentence, and a process that fails is gone.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxreason.errors import UserError, explain

_PORT = 8476  # where the launcher names hosts only
_SHUTDOWN_S = 1800  # at the end the others wait for process 0, which hashes the last checkpoint
_GRACE_S = 2.0  # between the last words of process 0 and its end, which is the end of the others
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process joins the others."""

    found: str  # who says so
    processes: int | None  # None: only the launcher's own service knows
    process: int  # this one's number
    join: Mapping[str, Any]  # arguments of jax.distributed.initialize


def detect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster that the flags or the environment describe; None for a process on its own. Starts nothing.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes, process_id: how many, and which of them this is.

    Raises: UserError for a description with parts missing, or that cannot be.
    """
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if any(value is not None for value in flags.values()):
        return _explicit("flags", flags)
    given = {name: environment.get(name) for name in _VARIABLES}
    if given["JAX_NUM_PROCESSES"] == "1":
        return None
    if given["JAX_NUM_PROCESSES"] or given["JAX_PROCESS_ID"]:
        return _explicit("environment", given)
    for read in (_skypilot, _slurm, _open_mpi, _kubernetes):
        if cluster := read(environment):
            return None if cluster.processes == 1 else cluster
    if given["JAX_COORDINATOR_ADDRESS"]:
        return _explicit("environment", given)  # which says what is missing: only a launcher can know the rest
    return None


@contextlib.contextmanager
def joined(cluster: Cluster | None) -> Iterator[None]:
    """Runs its body, which calls :func:`start`, as one process of ``cluster``; None: as a process on its own.

    A body that ends well meets the other processes once more when Python exits. One that raises cannot: the others stand
    in a collective and do not come. So the process says what happened, and which one it is, and ends: with status 2
    after a UserError or an OSError, 130 after Ctrl-C, else 1. The others end when they miss it, after 100 s at the latest.
    """
    try:
        yield
    except BaseException as error:
        if cluster is None:
            raise
        _leave(cluster, error)


def start(cluster: Cluster | None, timeout_s: float = 300) -> None:
    """Joins the others. Raises UserError if they have not all met within ``timeout_s`` seconds."""
    if cluster is None:
        return
    import jax

    # Its handler of SIGTERM would compete with train.interrupt.Interrupt, which makes the processes agree on a step.
    jax.config.update("jax_enable_preemption_service", False)
    failed: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **cluster.join, initialization_timeout=round(timeout_s) + 60, shutdown_timeout_seconds=_SHUTDOWN_S
            )
        except Exception as error:  # of the launcher's client, of the network, or of jax
            failed.append(error)

    # Where its own time limit passes, jax aborts the process; in a thread that is not waited for, ours passes first.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        late = "process 0 was not reached" if cluster.process else "the others did not all come"
        raise _cannot_join(cluster, f"{late} within {timeout_s:g} s")
    if failed:
        raise _cannot_join(cluster, (str(failed[0]).strip().splitlines() or [type(failed[0]).__name__])[0]) from failed[0]


def _cannot_join(cluster: Cluster, reason: str) -> UserError:
    address = cluster.join.get("coordinator_address", "the address that the launcher gives")
    return UserError(
        f"cannot join the other processes ({cluster.found}: process {cluster.process} of {cluster.processes or 'many'} at "
        f"{address}): {reason}; every process must run the same command, and the coordinator's port be free there and "
        "reachable from here"
    )


def _leave(cluster: Cluster, error: BaseException) -> None:
    """Says what happened and ends the process, past the barrier in which jax would wait for the others."""
    if isinstance(error, UserError):
        code, text = 2, f"error: {error}\n"
    elif isinstance(error, OSError):
        code, text = 2, f"error: {explain(error)}\n"
    elif isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted\n"
    else:
        code, text = 1, "".join(traceback.format_exception(error))
    sys.stdout.flush()
    sys.stderr.write(f"process {cluster.process}: {text}")  # at once, so that lines of several processes do not mix
    sys.stderr.flush()
    if cluster.process == 0:
        time.sleep(_GRACE_S)
    os._exit(code)


def local_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """GPUs that this process may see, without starting one."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def devices(cluster: Cluster | None) -> int:
    """GPUs over all processes, as far as it can be known before they have met: at least 2 for several processes."""
    here = local_gpus()
    if cluster is None:
        return max(here, 1)
    return (cluster.processes or 2) * max(len(cluster.join.get("local_device_ids", range(here))), 1)


def _explicit(found: str, given: Mapping[str, Any]) -> Cluster | None:
    names = list(given)
    if missing := [name for name in names if given[name] is None]:
        raise UserError(f"{' and '.join(n for n in names if n not in missing)} without {' and '.join(missing)}: give all three")
    address, count, index = given.values()
    count, index = _whole(names[1], count), _whole(names[2], index)
    if not 0 <= index < count:
        raise UserError(f"{names[2]} is {index}; with {names[1]} {count} it lies between 0 and {count - 1}")
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise UserError(f"{names[0]} is {address!r}; it is HOST:PORT of process 0")
    return None if count == 1 else _cluster(found, address, count, index)


def _cluster(found: str, address: str, count: int, index: int) -> Cluster:
    """Of processes that each use all the devices they see."""
    join = {"coordinator_address": address, "num_processes": count, "process_id": index,
            "cluster_detection_method": "deactivate"}  # fmt: skip
    return Cluster(found, count, index, join)


def _whole(name: str, text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, which is not a whole number") from None


def _skypilot(environment: Mapping[str, str]) -> Cluster | None:
    if not (nodes := environment.get("SKYPILOT_NODE_IPS", "").split()):
        return None
    rank = environment.get("SKYPILOT_NODE_RANK")
    if rank is None:
        raise UserError("SKYPILOT_NODE_IPS is set and SKYPILOT_NODE_RANK is not: run inside a SkyPilot task, or unset both")
    if (count := environment.get("SKYPILOT_NUM_NODES", str(len(nodes)))) != str(len(nodes)):
        raise UserError(f"SKYPILOT_NUM_NODES is {count} and SKYPILOT_NODE_IPS lists {len(nodes)}: SkyPilot sets both alike")
    return _cluster("SkyPilot", f"{nodes[0]}:{_PORT}", len(nodes), _whole("SKYPILOT_NODE_RANK", rank))


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """Processes that ``srun`` started; a shell in an allocation, or a batch script's own process, is alone."""
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return None
    count = _whole("SLURM_NTASKS", environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1"))
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 8(x4), or 8,4
    here = _whole("SLURM_STEP_TASKS_PER_NODE", per_node.partition("(")[0].partition(",")[0])
    process, local = (_whole(name, environment.get(name, "")) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    join: dict[str, Any] = {"cluster_detection_method": "slurm"}
    if gpus := local_gpus(environment):
        join["local_device_ids"] = _share("Slurm", gpus, here, local)
    return Cluster("Slurm", count, process, join)


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")]
    if environment[names[0]] == "1":
        return None  # mpirun -n 1 need not say more
    count, process, size, rank = (_whole(name, environment.get(name, "")) for name in names)
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        raise UserError(
            f"Open MPI started {count} processes and does not say where the first is, as version 5 no longer does: set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the last to $OMPI_COMM_WORLD_RANK"
        )
    join: dict[str, Any] = {"cluster_detection_method": "ompi"}
    if gpus := local_gpus(environment):
        join["local_device_ids"] = _share("Open MPI", gpus, size, rank)
    return Cluster("Open MPI", count, process, join)


def _kubernetes(environment: Mapping[str, str]) -> Cluster | None:
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    if find_spec("kubernetes") is None:
        raise UserError(
            "this is a pod of an Indexed Job (JOB_COMPLETION_INDEX): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID as in launch/kubernetes.yaml, or JAX_NUM_PROCESSES=1 for pods on their own, or "
            "pip install kubernetes, by which jax asks the cluster"
        )
    # jax's detection of Kubernetes has no name to ask for it by; without one it takes the first that fits.
    return Cluster("Kubernetes", None, _whole("JOB_COMPLETION_INDEX", environment["JOB_COMPLETION_INDEX"]), {})


def _share(launcher: str, gpus: int, processes: int, index: int) -> list[int]:
    """This process's part of the GPUs it sees: all if they were handed out already, else an even share."""
    if processes == 1 or gpus == 1:
        return list(range(gpus))
    if gpus % processes:
        raise UserError(f"{launcher}: {gpus} GPUs do not divide among {processes} processes of this host")
    each = gpus // processes
    return list(range(index * each, (index + 1) * each))
