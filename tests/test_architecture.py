"""Imports go one way; flax stays where DESIGN puts it; importing the package starts nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1] / "jaxreason"
# Each room may import from rooms of a lower number, and from itself.
LEVEL = {
    "errors": -2, "paths": -1, "command": 0, "locks": 0, "processes": 0, "text": 0, "plugins": 0, "config": 1, "types": 1,
    "origin": 1, "targets": 1, "terminal": 1,
    "data": 2,
    "model": 2, "losses": 2, "rewards": 2, "xla": 2, "distributed": 2, "restore": 3, "sharding": 3,
    "sampler": 4, "checkpoint": 4, "hf": 4,
    "weights": 5, "evaluate": 5, "handoff": 6, "train": 6, "convert": 7, "rl": 7, "serve": 7,
    "report": 7, "plan": 8, "compare": 8, "replay": 8,
    "harness": 8, "curate": 8, "pipeline": 9, "cli": 10, "completion": 11, "__main__": 12,
}  # fmt: skip


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "jaxreason":
                yield from (f"jaxreason.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_go_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            ours = parts[0] == "jaxreason" and len(parts) > 1 and parts[1] != room and not parts[1].startswith("__")
            if ours and LEVEL[parts[1]] >= LEVEL[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if parts[0] == "flax" and room not in ("model", "sharding"):
                wrong.append(f"{path.relative_to(ROOT)} imports flax")
            if parts[0] == "torch":
                wrong.append(f"{path.relative_to(ROOT)} imports torch")
    assert not wrong


def test_reading_a_config_imports_no_jax():
    code = "import sys, jaxreason.config as c; c.load('sft'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_take_at_most_ten_parameters():
    """A function with more wants a record."""
    many = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                many[f"{path.relative_to(ROOT)}:{node.name}"] = len([a for a in every if a.arg not in ("self", "cls")])
    assert not {name: count for name, count in many.items() if count > 10}


def test_every_parameter_is_annotated():
    """Of every function that has a name; mypy then checks what is passed."""
    bare = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
                names = [p.arg for p in every if p.annotation is None and p.arg not in ("self", "cls")]
                bare += [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}({name})" for name in names]
    assert not bare


def test_the_loops_are_short():
    """Set-up and a body that is read at a glance."""
    for name in ("train/sft.py", "rl/grpo.py"):
        (loop,) = (n for n in ast.parse((ROOT / name).read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "train")
        assert loop.end_lineno - loop.lineno < 100


def test_files_are_small():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_every_mutant_still_has_its_line_and_its_tests():
    """A stale one would say nothing: the line that it changes is in its file once, and the tests that notice it exist."""
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.note
        for word in mutant.tests.partition(" -k ")[0].split():
            file, _, name = word.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT.parent / file).read_text(), mutant.note
