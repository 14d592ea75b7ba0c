"""XLA's settings: what is set where, and that a flag nobody knows is a message and not an abort."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jaxreason import __main__, cli, xla
from jaxreason.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def configured(platform: str, *arguments: str, **environment: str) -> dict:
    """What ``configure`` sets, in a fresh process: it changes the process it runs in."""
    code = (
        "import json, jax; from jaxreason import xla\n"
        f"chosen = xla.configure({platform!r}, {', '.join(arguments)})\n"
        "print(json.dumps([chosen, jax.config.jax_compiler_enable_remat_pass, jax.config.jax_compilation_cache_dir]))"
    )
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    chosen, remat_pass, cache = json.loads(done.stdout)
    return chosen | {"remat_pass": remat_pass, "cache": cache}


def test_every_flag_is_known_to_the_installed_xla():
    everything = xla.flags("gpu", devices=8, deterministic=True)
    assert len(everything) > 5 and xla.unknown(everything) == []


def test_unknown_flags_are_found_without_dying():
    # the second was renamed years ago and is still in recipes; it aborts the process that uses it
    given = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_custom_fusions=true", "--xla_gpu_no_such_thing=1")
    assert xla.unknown(given) == list(given[1:])


def test_flags_by_platform_and_size():
    assert xla.flags("cpu", 8, True) == ()
    assert xla.flags("gpu", 1, False) == ()
    one, many = xla.flags("gpu", 1, True), xla.flags("gpu", 8, False)
    assert "--xla_gpu_exclude_nondeterministic_ops=true" in one and not set(one) & set(many)
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in many


def test_configure_for_a_gpu_and_what_the_user_said_wins(tmp_path):
    given = "--xla_gpu_enable_latency_hiding_scheduler=false"
    found = configured("gpu", "8", XLA_FLAGS=given, JAXREASON_CACHE=str(tmp_path))
    names = [flag.partition("=")[0] for flag in found["XLA_FLAGS"].split()]
    assert given in found["XLA_FLAGS"] and len(names) == len(set(names)) > 5
    assert found["XLA_CLIENT_MEM_FRACTION"] == "0.92" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in found
    assert found["remat_pass"] is False and found["cache"] == str(tmp_path / "xla")


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_memory_fraction_that_is_set_stays_the_only_one(name, tmp_path):
    """jaxlib refuses to start a GPU where both names are set."""
    found = configured("gpu", JAXREASON_CACHE=str(tmp_path), **{name: "0.5"})
    assert {key: value for key, value in found.items() if "MEM_FRACTION" in key} == {name: "0.5"}


def test_options_of_one_compilation_are_the_flags_that_the_user_did_not_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=3")
    found = xla.compile_options(8, deterministic=True)
    assert found["xla_gpu_enable_latency_hiding_scheduler"] is True and "xla_gpu_autotune_level" not in found
    assert found["xla_gpu_reduce_scatter_combine_threshold_bytes"] == str(2**27)
    assert len(found) == len(xla.flags("gpu", 8, True)) - 1
    # a switch in one version of XLA, a mode in the next: whichever the user names stands for both
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_gather=false")
    found = xla.compile_options(8, deterministic=False)
    assert not [name for name in found if "pipeline" in name and "all_gather" in name]
    assert len([name for name in found if "pipeline" in name]) == 2


def test_a_value_that_a_flag_does_not_take_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=many")
    with pytest.raises(UserError, match="knows --xla_gpu_autotune_level, but not with this value"):
        xla.configure("cpu")


def test_configure_for_a_cpu_sets_the_compilation_cache_alone(tmp_path):
    found = configured("cpu", JAXREASON_CACHE=str(tmp_path))
    assert found == {"remat_pass": True, "cache": str(tmp_path / "xla"), "jax_compilation_cache_dir": str(tmp_path / "xla")}


def test_configure_names_a_flag_that_is_unknown(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_no_such_thing=1")
    with pytest.raises(UserError, match="does not know --xla_gpu_no_such_thing=1; remove it from XLA_FLAGS"):
        xla.configure("cpu")


def test_a_run_checks_the_flags_before_xla_starts(tmp_path):
    """XLA itself would abort the process with a C++ stack trace."""
    words = ["--config", "sft", f"run.dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *words], capture_output=True, text=True, check=False,
        env={**os.environ, "XLA_FLAGS": "--xla_gpu_no_such_thing=1"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: the installed XLA does not know --xla_gpu_no_such_thing=1")
    assert len(done.stderr.splitlines()) == 1


def test_detect_follows_what_was_asked(monkeypatch):
    for asked, found in (("cpu", "cpu"), ("cuda", "gpu"), ("gpu,cpu", "gpu"), ("cpu,cuda", "cpu")):
        monkeypatch.setenv("JAX_PLATFORMS", asked)
        assert xla.detect() == found


def test_a_plugin_without_a_gpu_says_nothing():
    """The extras plan and test install CUDA's plugin; without a driver its search for a GPU ends in a stack trace."""
    code = "from jaxreason import xla; xla.leave_out_absent_gpu(); import jax; print(jax.default_backend())"
    clean = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert xla.detect() == "gpu" or done.stdout.strip() == "cpu"


def restarted(tmp_path: Path, kernel: str, before: str = "pass", **environment: str) -> list[str]:
    """What a process prints that asks for huge pages of a kernel whose mode is ``kernel``: its tunables, pid and words.

    ``before``: what it runs first.
    """
    mode = tmp_path / "enabled"
    mode.write_text(kernel)
    code = (
        "import os, sys; from pathlib import Path; from jaxreason import xla\n"
        f"xla._PAGES = Path({str(mode)!r})\n"
        f"print('started'); {before}; xla.start_with_huge_pages()\n"
        "print(os.environ.get('GLIBC_TUNABLES'), os.getpid(), sys.argv[1:])"
    )
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    with subprocess.Popen(
        [sys.executable, "-c", code, "a b", "c"], env=clean | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        out, _ = process.communicate()
    return [line.replace(str(process.pid), "PID") for line in out.splitlines()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is who asks for huge pages")
def test_huge_pages_are_asked_for_by_starting_again_once_as_the_same_process(tmp_path):
    end = "PID ['a b', 'c']"
    asks = ["started", "started", f"glibc.malloc.hugetlb=1 {end}"]
    assert restarted(tmp_path, "always [madvise] never") == asks
    others = "glibc.malloc.arena_max=2"
    assert restarted(tmp_path, "always [madvise] never", GLIBC_TUNABLES=others)[-1] == f"{others}:{asks[-1]}"
    # Nothing is done where they come by themselves, where there are none, or where the user has said it.
    assert restarted(tmp_path, "[always] madvise never") == ["started", f"None {end}"]
    assert restarted(tmp_path, "always madvise [never]") == ["started", f"None {end}"]
    notebook = restarted(tmp_path, "always [madvise] never", "sys.argv[0] = 'scripts/train.py'")
    assert notebook == ["started", f"None {end}"]
    debugged = restarted(tmp_path, "always [madvise] never", "sys.settrace(lambda *_: None)")
    assert debugged == ["started", f"None {end}"]
    own = "glibc.malloc.hugetlb=0"
    assert restarted(tmp_path, "always [madvise] never", GLIBC_TUNABLES=own) == ["started", f"{own} {end}"]


def test_a_command_that_is_the_whole_process_asks_for_huge_pages_and_one_that_is_called_does_not(monkeypatch, capsys):
    words = ["--model", "nothing-here", "--prompt", "1+1"]
    asked = []
    monkeypatch.setattr(xla, "start_with_huge_pages", lambda: asked.append(1))
    monkeypatch.setattr(sys, "argv", ["generate.py", *words])
    assert cli.generate(words) == 2 and not asked
    assert cli.generate() == 2 and len(asked) == 1
    monkeypatch.setattr(sys, "argv", ["jaxreason", "generate", *words])
    assert __main__.main(sys.argv[1:]) == 2 and len(asked) == 1
    assert __main__.main() == 2 and len(asked) == 2
    assert capsys.readouterr().err.count("error: ") == 4
