"""Opens an export with other people's programs, in an environment of its own, and compares greedy text: not part of the suite.

    python tests/opens.py EXPORT [--transformers 4.51.3] [--torch 2.13.0] [--venv FOLDER]
    python tests/opens.py EXPORT|RUN --llama-cpp SOURCES [--build FOLDER] [--venv FOLDER]

EXPORT is a folder that ``convert.py to-hf`` wrote. The environment is made once (a few minutes) and used again.

With --llama-cpp the program is llama.cpp, built once from SOURCES (its repository, or ``vendor/llama.cpp`` of the source
package of llama-cpp-python; cmake and a C++ compiler are needed, half an hour of two cores). An export is given to its
``convert_hf_to_gguf.py``, a run or an export with the embedded tokenizer to ``convert.py to-gguf``, both in float32, and ids
of texts are compared as well.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxreason.data.embedded.arithmetic import Arithmetic, generate
from jaxreason.data.tokenizer import Tokenizer, load
from jaxreason.hf.gguf import is_embedded
from jaxreason.weights import locate

QUESTIONS = (
    "Ben has 55 shells, finds 84 and gives away 19. How many shells are left?",
    "What is 17 + 25?",
)
TEXTS = (
    "Compute 1234567 - 89 = 3.14e10",
    "Größe, naïve, 数学 и ещё 🙂👩‍🚀",
    "a\n\n\nb \n \t  c\r\n   d ",
    "<think>\n12+7=19\n</think>\n\n\\boxed{19}",
    "It's what they'll say, isn't it? WE'RE (not) ... x**2==y_1;",
)
SCRIPTS = Path(__file__).parents[1] / "scripts"
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


def said(command: list[str], given: str | None = None) -> str:
    """What the command printed, to ``given`` as its standard input; its errors are shown where it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, input=given, encoding="utf-8", errors="replace").stdout


def task_texts() -> list[str]:
    """A thousand problems of the embedded task with their solutions: in other texts to-gguf promises no ids."""
    examples = itertools.islice(generate(Arithmetic(operations=4, careful=0.5), "eval", 1), 1000)
    return ["<|eot_id|>".join(f"{each.user}<|eot_id|><think>\n{each.think}\n</think>\n\n{each.answer}" for each in examples)]


def built(sources: Path, folder: Path) -> Path:
    """The folder of the two programs of llama.cpp that are asked; what is there is used as it is."""
    programs = ("llama-completion", "llama-tokenize")
    if not all((folder / "bin" / name).exists() for name in programs):
        off = ("BUILD_SHARED_LIBS", "LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER")
        flags = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
        subprocess.run(["cmake", "-S", str(sources), "-B", str(folder), *flags], check=True)
        subprocess.run(["cmake", "--build", str(folder), "-j", "2", "--target", *programs], check=True)
    return folder / "bin"


def gguf_of(model: Path, embedded: bool, sources: Path, python: Path, out: Path) -> Path:
    """A file in float32, by ``convert.py to-gguf`` for the embedded tokenizer, else by llama.cpp's converter."""
    theirs = [str(python), str(sources / "convert_hf_to_gguf.py"), str(model), "--outtype", "f32", "--outfile", str(out)]
    said([sys.executable, str(SCRIPTS / "convert.py"), "to-gguf", str(model), str(out)] if embedded else theirs)
    return out


class LlamaCpp:
    """llama.cpp's programs on one file."""

    def __init__(self, programs: Path, file: Path, tokenizer: Tokenizer, embedded: bool):
        self.programs, self.file, self.tokenizer, self.embedded = programs, file, tokenizer, embedded
        bos = tokenizer.bos_id
        self.adds_bos = bos is not None and self.ids("x", "--no-parse-special")[:1] == [bos]

    def ids(self, text: str, *words: str) -> list[int]:
        asked = ["-m", str(self.file), "--stdin", "--ids", "--no-escape", "--log-disable", *words]
        return json.loads(said([str(self.programs / "llama-tokenize"), *asked], text).splitlines()[-1])

    def prompt(self, question: str) -> str:
        """The prompt as llama.cpp is to be given it: without the first token where it adds that itself."""
        turns = [{"role": "user", "content": question}]
        text = self.tokenizer.hf.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return text.removeprefix(self.tokenizer.hf.bos_token) if self.adds_bos else text

    def answer(self, question: str) -> str:
        """Greedy text, with keys and values in float32 as well: its own float16 decides where two tokens are all but equal."""
        words = ["-m", str(self.file), "-p", self.prompt(question), "--no-escape", "-no-cnv", "--no-display-prompt", "-ngl", "0"]
        exact = ["--temp", "0", "-n", "64", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
        return said([str(self.programs / "llama-completion"), *words, *exact]).strip().removesuffix("[end of text]").strip()

    def other_ids(self) -> int:
        """How many texts it tokenizes in another way; each is printed."""
        prompts = [self.prompt(question) for question in QUESTIONS]
        bos = [self.tokenizer.bos_id] if self.adds_bos else []
        texts = (*prompts, *(task_texts() if self.embedded else TEXTS))
        rows = [(text, self.ids(text), bos + self.tokenizer.encode(text)) for text in texts]
        for text, theirs, ours in rows:
            print(f"{'same' if theirs == ours else 'DIFFERENT'}: {len(ours)} ids of {text[:200]!r}")
        return sum(theirs != ours for _, theirs, ours in rows)


def other_answers(model: Path, answer: Callable[[str], str]) -> int:
    """How many questions ``answer`` answers in other words than generate.py; both are printed."""
    differ = 0
    for question in QUESTIONS:
        theirs = answer(question)
        words = ["--model", str(model), "--prompt", question, "temperature=0", "max_completion_tokens=64"]
        ours = said([sys.executable, str(SCRIPTS / "generate.py"), *words, "compute_dtype=float32"]).strip()
        differ += theirs != ours
        print(f"{'same' if theirs == ours else 'DIFFERENT'}: {question}", repr(theirs), repr(ours), sep="\n  ")
    return differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--transformers", default="4.51.3")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCES")
    parser.add_argument("--build", type=Path, default=Path(tempfile.gettempdir()) / "jaxreason-opens-llama.cpp")
    args = parser.parse_args()
    folder = args.venv or Path(tempfile.gettempdir()) / f"jaxreason-opens-{args.transformers}-{args.torch}"
    packages = [f"transformers=={args.transformers}", f"torch=={args.torch}", "gguf", "sentencepiece"]
    python = environment(folder, packages)
    if args.llama_cpp is None:
        command = [str(python), "-c", THEIRS, str(args.export)]
        return int(other_answers(args.export, lambda question: said([*command, question]).strip()) > 0)
    with tempfile.TemporaryDirectory() as place:
        source = locate(str(args.export))
        tokenizer = load(source.tokenizer)
        embedded = is_embedded(tokenizer)
        file = gguf_of(args.export, embedded, args.llama_cpp, python, Path(place) / "model.gguf")
        other = LlamaCpp(built(args.llama_cpp, args.build), file, tokenizer, embedded)
        return int(other.other_ids() + other_answers(args.export, other.answer) > 0)


if __name__ == "__main__":
    sys.exit(main())
