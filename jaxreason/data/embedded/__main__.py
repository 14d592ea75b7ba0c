"""``python -m jaxreason.data.embedded [TASK] [--rebuild-tokenizer]``: what a task looks like."""

import argparse
import sys

from jaxreason.data import chat, tokenizer
from jaxreason.data.embedded import SPLITS, TASKS, examples
from jaxreason.data.embedded.build_tokenizer import write_tokenizer
from jaxreason.errors import UserError

PERCENTILES = (0, 10, 50, 90, 99, 100)
SAMPLE = 2000


def describe(name: str) -> str:
    """Three examples of each split and percentiles of the token lengths of ``SAMPLE`` training examples."""
    tok = tokenizer.load("embedded")
    template = chat.resolve(tok)
    lines = []
    for split in SPLITS:
        for example in examples(name, split, 3):
            lines += [f"[{split}] {example.user}", example.reply or "", ""]
    pairs = [template.render(example) for example in examples(name, "train", SAMPLE)]
    prompts = [len(ids) for ids in tok.encode_batch([prompt for prompt, _ in pairs])]
    completions = [len(ids) for ids in tok.encode_batch([completion for _, completion in pairs])]
    totals = [p + c for p, c in zip(prompts, completions)]
    lines.append(f"vocabulary {tok.vocab_size}, tokens of {SAMPLE} training examples, template included:")
    lines.append(" " * 11 + "".join(f"{f'p{p}':>6}" for p in PERCENTILES) + f"{'mean':>8}")
    for label, values in (("prompt", prompts), ("completion", completions), ("total", totals)):
        ordered = sorted(values)
        cells = "".join(f"{ordered[(len(ordered) - 1) * p // 100]:>6}" for p in PERCENTILES)
        lines.append(f"{label:<11}{cells}{sum(values) / len(values):>8.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxreason.data.embedded", description=__doc__)
    parser.add_argument("task", nargs="?", default="arithmetic", help=f"one of {', '.join(TASKS)}, with parameters")
    parser.add_argument("--rebuild-tokenizer", action="store_true", help="write jaxreason/data/embedded_tokenizer anew")
    arguments = parser.parse_args()
    try:
        if arguments.rebuild_tokenizer:
            write_tokenizer()
        print(describe(arguments.task))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
