"""What people see: a run's end, progress at 80 columns, a conversation, and the one command with its completion."""

import argparse
import io
import re
import shlex
import subprocess

import jax
import pytest
from rich.console import Console
from test_compare import make_run
from test_handoff import random_params

from jaxreason import __main__ as console
from jaxreason import checkpoint, cli, model, serve, terminal
from jaxreason.command import told
from jaxreason.data.tokenizer import load
from jaxreason.report import end
from jaxreason.report.read import read_run
from jaxreason.sharding import make_mesh
from jaxreason.train.log import Log
from jaxreason.weights import locate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model with random weights and 96 positions."""
    root = tmp_path_factory.mktemp("run")
    sizes = {"num_layers": 1, "embed_dim": 32, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    tokenizer = load("embedded")
    config = model.preset("embedded-tiny", sizes | {"max_positions": 96}).replace(stop_ids=tokenizer.stop_ids)
    checkpoint.save_params(root / "checkpoints", random_params(config), config)
    tokenizer.save(root / "tokenizer")
    return root


# ---- the end of a run


def finished(root, **sample):
    before = {"eval_accuracy": 0.6, "eval_accuracy_low": 0.502, "eval_accuracy_high": 0.691}
    after = {"eval_accuracy": 0.8, "eval_accuracy_low": 0.711, "eval_accuracy_high": 0.867}
    lines = [{"step": step, "eval_problems": 100, **found} for step, found in ((0, before), (2, after))]
    drawn = {"step": 2, "group": 0, "prompt": "1 + 1 =", "gold": "2", "completion": "\\boxed{2}", "tokens": 4, "truncated": False,
             "advantage": 0.5, "reward": 1.0, "rewards": {"accuracy": 1.0}}  # fmt: skip
    return make_run(root, "a", 0, lines, samples=[drawn | sample])


def test_a_run_ends_in_words(tmp_path, capsys):
    """20 − √(8.9² + 9.1²) = 7.3 and 20 + √(6.7² + 9.8²) = 31.9 points."""
    path = finished(tmp_path)
    end.show(str(path), told)
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith(f"{path} is done: 2 steps, ") and "2.0 min" in said[1]
    assert said[2] == (
        "Accuracy 60.0 → 80.0 % (95 % interval 71.1–86.7) on 100 held-out problems: +20.0 points (+7.3 to +31.9)."
    )
    assert said[4:8] == ["a sample of step 2 (reward 1, 4 tokens; right is 2):", "  1 + 1 =", "  ↳", "  \\boxed{2}"]
    assert f"report: {path}/report.html" in said and (path / "report.html").is_file()
    # Every line that it offers is a command that parses.
    offered = [shlex.split(line) for line in said[said.index("next:") + 1 :]]
    assert [words[1] for words in offered] == [f"scripts/{name}.py" for name in ("generate", "evaluate", "report", "convert")]
    for words in offered:
        verb = words[1].removeprefix("scripts/").removesuffix(".py")
        parser = terminal_parser(verb)
        assert str(path) in vars(parser.parse_args([w for w in words[2:] if "=" not in w])).values() or verb == "evaluate"


def terminal_parser(verb):
    parser = argparse.ArgumentParser()
    cli.COMMANDS[verb].arguments(parser)
    return parser


def test_what_a_model_wrote_does_not_steer_the_terminal(tmp_path):
    run = read_run(finished(tmp_path, completion="a\x1b[2Jb\rc\nd" + "x" * 900, reward=None))
    said = end.said(run, "a")
    assert "  a�[2Jb�c" in said and not any(c in line for line in said for c in "\x1b\r\n")
    assert said[-3].endswith(" … (110 more characters)") and "(no reward, 4 tokens; right is 2):" in said[4]


def test_a_report_that_fails_is_a_line_and_not_the_runs_failure(tmp_path, monkeypatch, capsys):
    path = finished(tmp_path)
    end.show(str(path), told, page=False)
    assert not (path / "report.html").exists() and "report.html" not in capsys.readouterr().out
    monkeypatch.setattr(end, "write_run_report", lambda path: 1 / 0)
    end.show(str(path), told)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"(ZeroDivisionError: division by zero); try: python scripts/report.py {path}")


# ---- progress


def test_step_bar_and_eta_stay_at_80_columns(tmp_path, monkeypatch):
    shown = Console(width=80, force_terminal=True, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(terminal, "console", shown)
    monkeypatch.setattr("jaxreason.train.log.console", shown)
    log = Log(tmp_path, cli.cfg.load("sft"), 4000, 0, {"reward": "reward", "completion_tokens": "length" * 20})
    log.write(1200, {"reward": 0.5, "completion_tokens": 60.0})
    with terminal.Working("evaluation", 25600, "no tokens yet " * 9) as show:
        show(12800, "5 tokens " * 9)
        terminal.bars._display.refresh()
    log.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", shown.file.getvalue()).splitlines()
    steps = [line for line in lines if "1200/4000" in line]
    assert steps and all("━" in line and " eta " in line and "reward 0.5" in line and len(line) <= 80 for line in steps)
    assert any("12800/25600" in line and " eta " in line and len(line) <= 80 for line in lines)
    assert terminal.bars._display is None  # the outer bar stays on the screen, the inner one is gone
    assert "1200/4000" in lines[-2 if not lines[-1].strip() else -1]


def test_weights_say_how_much_of_them_is_there(run, tmp_path, monkeypatch):
    """The parts add up to all of them, and what is said of them stays."""
    seen = []

    class Seen(terminal.Working):
        def __call__(self, done, text=None):
            super().__call__(done, text)
            seen.append((done, self._total, self._text))

    monkeypatch.setattr("jaxreason.weights.Working", Seen)
    assert cli.convert(["to-hf", str(run), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    source = locate(str(tmp_path / "hf"))
    config = source.config("float32", "float32")
    source.params(config, make_mesh(cli.cfg.Mesh()))
    parts, totals, texts = zip(*seen)
    assert list(parts) == sorted(set(parts)) and len(parts) == len(jax.tree.leaves(model.shapes(config)))
    assert parts[-1] == pytest.approx(model.param_count(config) * 4 / 2**20)
    assert set(totals) == {max(1, int(parts[-1]))} and set(texts) == {f"MiB of {tmp_path / 'hf'}"}


# ---- a conversation


def test_a_conversation_keeps_its_turns(run, monkeypatch, capsys):
    """Each prompt is what the template makes of all turns so far; what was not asked is no turn."""
    asked = []

    def answer(opened, ids, options, number):
        asked.append(opened.tokenizer.decode(ids, skip_special_tokens=False))
        print(f"{len(asked)}!")
        return f"{len(asked)}!"

    typed = iter(["one", "", "two", "/what", "x" * 200, "and", "/reset", "three", "/exit", "four"])
    monkeypatch.setattr(serve, "_streamed", answer)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert cli.generate(["--model", str(run), "--chat", "max_completion_tokens=16"]) == 0
    heard = capsys.readouterr()
    assert heard.out == "1!\n2!\n3!\n4!\n"
    kept = ["one"], ["one", "1!", "two"], ["one", "1!", "two", "2!", "and"], ["three"]
    for prompt, expected in zip(asked, kept):
        turns = re.findall(r"<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", prompt)
        assert turns == expected and prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    said = [line for line in heard.err.splitlines() if line.startswith("(")]
    assert "no command" in said[1] and said[3] == "(the conversation is forgotten)"
    assert re.fullmatch(r"\(not asked: the conversation has \d+ tokens, and max_completion_tokens=16 of the model's 96 positions "
                        r"leave room for 80; /reset forgets it\)", said[2])  # fmt: skip


def test_a_conversation_is_drawn_and_ends_with_its_input(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1 =\n"))
    assert cli.generate(["--model", str(run), "--chat", "max_completion_tokens=8"]) == 0
    first = capsys.readouterr().out
    assert cli.generate(["--model", str(run), "--prompt", "1 + 1 =", "max_completion_tokens=8"]) == 0
    assert first == capsys.readouterr().out and len(first) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chat", "--prompt", "x"], "leave --prompt out"), (["--chat", "--strategy", "cot"], "leave --strategy out"),
        (["--chat", "--out", "x"], "leave --out out"), ([], "give --prompt TEXT, or --chat"),
    ],
)  # fmt: skip
def test_what_a_conversation_does_not_combine_with(words, said, capsys):
    assert cli.generate(["--model", "none", *words]) == 2
    assert said in capsys.readouterr().err


# ---- one command


def test_the_command_lists_every_other(capsys):
    with pytest.raises(SystemExit):
        console.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for verb, command in cli.COMMANDS.items():
        assert f"{verb} {' '.join(command.work.__doc__.split())}" in said
    with pytest.raises(SystemExit):
        console.main(["convert", "to-hf", "--help"])
    assert capsys.readouterr().out.startswith("usage: jaxreason convert to-hf ")
    assert console.main(["trian"]) == 2 and "did you mean train?" in capsys.readouterr().err
    assert console.main(["train", "--config", "stf"]) == 2
    said = capsys.readouterr().err
    assert "did you mean sft?" in said and re.search(r"\(searched: .*/configs\)", said)
    assert console.main(["train", "--config", "sft", "run.seed=7", "--print-config"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_the_command_tells_how_it_was_started(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/jaxreason", "train"])
    assert told("build-data") == "jaxreason build-data"
    monkeypatch.setattr("sys.argv", ["scripts/train.py"])
    assert told("build-data") == "python scripts/build_data.py"


def test_bash_completes(tmp_path, capsys):
    assert console.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    lines = {
        "jaxreason rep": "report replay", "jaxreason train --config llama3.2-3b/sft": "llama3.2-3b/sft llama3.2-3b/sft_lora",
        "jaxreason train --config sft train.ste": "nospace train.steps=", "jaxreason generate --ch": "--chat",
        "jaxreason pipeline --config ": "r1 r1-llama3.2-3b", "jaxreason convert to-": "to-hf to-peft to-gguf",
        "jaxreason convert to-hf scr": "script",
    }  # fmt: skip
    empty = "''"
    asks = "\n".join(
        f"COMP_WORDS=({line}{empty if line.endswith(' ') else ''}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=(); "
        "_jaxreason; echo ${COMPREPLY[@]}" for line in lines
    )  # fmt: skip
    code = f"source ./script\ncompopt() {{ [[ $2 == nospace ]] && echo -n 'nospace '; }}\n{asks}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(lines.values())
    for shell in ("zsh", "fish"):
        assert console.main(["completion", shell]) == 0 and "smollm2-135m/sft" in capsys.readouterr().out
