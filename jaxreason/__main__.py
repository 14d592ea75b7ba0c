"""``jaxreason COMMAND …``: the commands of scripts/ under one name."""

import sys
from collections.abc import Sequence

from jaxreason.cli import COMMANDS
from jaxreason.command import PROGRAM
from jaxreason.plugins import nearest


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:], prog=f"{PROGRAM} {words[0]}", own_process=argv is None)
    known = [*COMMANDS, "completion"]
    if words and not words[0].startswith("-") and words[0] not in known:
        print(f"error: {words[0]}: no such command{nearest(words[0], known)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    from jaxreason import completion

    args = completion.parser().parse_args(words)  # --help and what is wrong end here
    print(completion.script(args.shell))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
