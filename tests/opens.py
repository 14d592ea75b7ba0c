"""Opens an export in an environment of its own, with another transformers, and compares greedy text: not part of the suite.

    python tests/opens.py EXPORT [--transformers 4.51.3] [--torch 2.13.0] [--venv FOLDER]

EXPORT is a folder that ``convert.py to-hf`` wrote. The environment is made once (a few minutes) and used again.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTIONS = (
    "Ben has 55 shells, finds 84 and gives away 19. How many shells are left?",
    "What is 17 + 25?",
)
THEIRS = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
path, question = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
turns = [{"role": "user", "content": question}]
ids = tokenizer(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False), add_special_tokens=False,
                return_tensors="pt")["input_ids"]
out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=0)
print(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip())
"""


def environment(folder: Path, packages: list[str]) -> Path:
    """The Python of a virtual environment with ``packages``; one that is there is used as it is."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return python


def said(command: list[str]) -> str:
    """What the command printed; its errors are shown where it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--transformers", default="4.51.3")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--venv", type=Path)
    args = parser.parse_args()
    folder = args.venv or Path(tempfile.gettempdir()) / f"jaxreason-opens-{args.transformers}-{args.torch}"
    python = environment(folder, [f"transformers=={args.transformers}", f"torch=={args.torch}"])
    generate = Path(__file__).parents[1] / "scripts" / "generate.py"
    differ = 0
    for question in QUESTIONS:
        theirs = said([str(python), "-c", THEIRS, str(args.export), question])
        words = ["--model", str(args.export), "--prompt", question, "temperature=0", "max_completion_tokens=64"]
        ours = said([sys.executable, str(generate), *words, "compute_dtype=float32"])
        differ += theirs != ours
        print(f"{'same' if theirs == ours else 'DIFFERENT'}: {question}", repr(theirs), repr(ours), sep="\n  ")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
