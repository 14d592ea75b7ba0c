"""The parser of the console command, and what a shell needs to complete its words."""

import argparse

import shtab

from jaxreason import config as cfg
from jaxreason.cli import COMMANDS
from jaxreason.command import PROGRAM

SHELLS = ("bash", "zsh", "fish")
_FILES = {"model", "out", "run", "other", "tree", "report_only"}  # arguments that are paths
_KEYS: dict[str, list[type[cfg.Section]]] = {
    "train": list(cfg.ALGORITHMS.values()), "compare": list(cfg.ALGORITHMS.values()), "plan": list(cfg.ALGORITHMS.values()),
    "generate": [cfg.Decode], "evaluate": [cfg.Task], "build-data": [cfg.Build],
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Of all commands, for ``--help`` and for shells; a command parses its own words when it runs."""
    whole = argparse.ArgumentParser(prog=PROGRAM, description="SFT and GRPO for models that reason, in pure-functional JAX.")
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for verb, command in COMMANDS.items():
        about = (command.work.__doc__ or "").split("\n")[0]
        command.arguments(verbs.add_parser(verb, help=about, description=command.work.__doc__))
    about = "Prints what a shell completes this command by."
    shell = verbs.add_parser("completion", help=about, description=f"{about} {' · '.join(_INSTALL)}")
    shell.add_argument("shell", choices=SHELLS)
    return whole


_INSTALL = (
    f'bash: eval "$({PROGRAM} completion bash)" in ~/.bashrc',
    f'zsh: {PROGRAM} completion zsh > "${{fpath[1]}}/_{PROGRAM}"',
    f"fish: {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish",
)


_NO_SPACE = f"""# After key= comes its value, not a space.
_{PROGRAM}() {{
  _shtab_{PROGRAM} "$@"
  if [[ "${{COMPREPLY[0]-}}" == *= ]]; then compopt -o nospace; fi
}}
complete -o bashdefault -F _{PROGRAM} {PROGRAM}"""


def script(shell: str) -> str:
    """The completion script of a shell: commands, flags, the names of configs, the keys of key=value, and files."""
    whole = parser()
    (verbs,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for verb, command in verbs.choices.items():
        for action in command._actions:
            _complete(action, verb)
    text = shtab.complete(whole, shell)
    return f"{text}\n{_NO_SPACE}" if shell == "bash" else text


def _complete(action: argparse.Action, verb: str) -> None:
    if action.dest == "config":
        names = [name.partition("pipeline/") for name in cfg.names()]
        action.choices = [after for before, _, after in names if after] if verb == "pipeline" else [
            before for before, _, after in names if not after
        ]  # fmt: skip
    elif action.dest == "words" and verb in _KEYS:
        action.choices = list(dict.fromkeys(f"{key}=" for section in _KEYS[verb] for key in cfg.keys(section)))
    elif action.dest in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab documents this attribute, which argparse lacks
    elif isinstance(action, argparse._SubParsersAction):
        for inner in action.choices.values():
            for one in inner._actions:
                _complete(one, verb)
