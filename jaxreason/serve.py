"""A model opened for decoding: what generate.py and evaluate.py do."""

import dataclasses
import sys
from collections.abc import Iterable

from jaxreason import config as cfg
from jaxreason.data import chat as chats
from jaxreason.data.example import Example, Reject
from jaxreason.data.prompts import load_prompts
from jaxreason.data.sources import splits_itself
from jaxreason.data.tokenizer import Tokenizer, load
from jaxreason.errors import UserError
from jaxreason.evaluate.accuracy import evaluate, grading_of
from jaxreason.sampler import EngineSampler, Job, sampling_of
from jaxreason.sharding import make_mesh
from jaxreason.weights import locate


@dataclasses.dataclass
class Opened:
    """A model that can be asked."""

    sampler: EngineSampler  # with its weights
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]


def open_model(name: str, options: cfg.Decode) -> Opened:
    """Loads a run, checkpoint, Hugging Face directory or hub id for decoding. Raises UserError."""
    source = locate(name)
    tokenizer = load(source.tokenizer)
    config = source.config(options.compute_dtype, options.compute_dtype).replace(attention=options.attention)
    stops = tuple(sorted({*config.arch.stop_ids, *tokenizer.stop_ids}))
    mesh = make_mesh(cfg.Mesh())
    sampler = EngineSampler(config, stops, mesh)
    sampler.load(source.params(config, mesh), step=0)
    return Opened(sampler, tokenizer, stops)


def answer(name: str, message: str, options: cfg.Decode) -> None:
    """Prints the model's answer to one user message while it is being written."""
    opened = open_model(name, options)
    chat = chats.resolve(opened.tokenizer, options.template, options.system_prompt)
    try:
        prompt = opened.tokenizer.encode(chat.render_prompt(Example(message)))
    except chats.Refused:
        raise
    except Reject as reject:
        raise UserError(f"--prompt holds {reject.reason}; leave it out") from None
    stops, written = opened.stop_ids, ""
    seen: list[int] = []

    def show(prompt_index: int, sample_index: int, tokens: Iterable[int]) -> None:
        nonlocal written
        seen.extend(int(t) for t in tokens if int(t) not in stops)
        text = opened.tokenizer.decode(seen)
        # A multi-byte character may still lack its last bytes.
        whole = text[: -len("\ufffd")] if text.endswith("\ufffd") else text
        sys.stdout.write(whole[len(written) :])
        sys.stdout.flush()
        written = whole

    opened.sampler.stream([prompt], Job(sampling_of(options), seed=options.seed, slots=1), show)
    print()


def measure(name: str, task: str, samples: int, options: cfg.Task) -> tuple[dict, list[dict]]:
    """Accuracy of a model on a task's problems, and every completion."""
    opened = open_model(name, options)
    data = cfg.Data(
        source=task, split=options.split or ("eval" if splits_itself(task) else "test"), max_rows=options.problems,
        system_prompt=options.system_prompt, template=options.template,
    )  # fmt: skip
    prompts = load_prompts(data, opened.tokenizer, options.seed)
    job = Job(sampling_of(options), samples, options.seed, slots=options.slots)
    return evaluate(opened.sampler, prompts.prompts, opened.tokenizer, grading_of(options), job)
