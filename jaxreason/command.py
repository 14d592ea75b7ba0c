"""What every command has in common: its words are parsed, one function is called, and failures become one line and a status.

Exit status: 0 when all is done; 2 after one message of what a person can mend (a UserError, or what the operating system
refused); 130 after a second Ctrl-C.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxreason.errors import UserError, explain

PROGRAM = "jaxreason"  # the console command


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: called with its words, it returns its exit status."""

    arguments: Callable[[argparse.ArgumentParser], None]  # adds what it takes
    work: Callable[[argparse.Namespace], int | None]  # its docstring is the command's description

    def __call__(self, argv: Sequence[str] | None = None, prog: str | None = None, own_process: bool = False) -> int:
        """``prog``: what the user typed; None: the script of this name. ``own_process``: this process does nothing else, which is
        also so without ``argv``."""
        try:
            # A script's own folder is on the path, the one it is run from is not: package.module:function of a loss or a
            # reward is looked for there last.
            if (here := os.getcwd()) not in sys.path:
                sys.path.append(here)
            parser = argparse.ArgumentParser(prog=prog or f"{self.work.__name__}.py", description=self.work.__doc__)
            self.arguments(parser)
            given = sys.argv[1:] if argv is None else list(argv)
            # Words such as key=value may stand among the options, but not where one of them is a verb of its own.
            verbs = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
            args = (parser.parse_args if verbs else parser.parse_intermixed_args)(given)
            args.given, args.own_process = given, own_process or argv is None
            return self.work(args) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: {explain(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


def command(
    arguments: Callable[[argparse.ArgumentParser], None],
) -> Callable[[Callable[[argparse.Namespace], int | None]], Command]:
    """Makes a :class:`Command` of the function below it."""
    return lambda work: Command(arguments, work)


def told(verb: str) -> str:
    """How a person starts the command ``verb`` in the way in which they started this one."""
    return f"{PROGRAM} {verb}" if Path(sys.argv[0]).name == PROGRAM else f"python scripts/{verb.replace('-', '_')}.py"
