"""A model opened for decoding: what generate.py and evaluate.py do."""

import dataclasses
import sys
from collections.abc import Iterable

import jax

from jaxreason import config as cfg
from jaxreason import rewards
from jaxreason.data import chat as chats
from jaxreason.data.example import Example
from jaxreason.data.prompts import load_prompts
from jaxreason.data.sources import splits_itself
from jaxreason.data.tokenizer import Tokenizer, load
from jaxreason.model import unstack
from jaxreason.rollout import Engine, sampling_of
from jaxreason.sharding import make_mesh, replicated
from jaxreason.train.evaluation import evaluate
from jaxreason.weights import locate


@dataclasses.dataclass
class Opened:
    engine: Engine
    params: dict  # unstacked
    tokenizer: Tokenizer


def open_model(name: str, options: cfg.Decode, slots: int) -> Opened:
    """Loads a run, checkpoint, Hugging Face directory or hub id and makes an engine for it. Raises UserError."""
    source = locate(name)
    tokenizer = load(source.tokenizer)
    config = source.config(options.compute_dtype, options.compute_dtype).replace(attention=options.attention)
    stops = tuple(sorted({*config.arch.stop_ids, *tokenizer.stop_ids}))
    sampling = sampling_of(options)
    mesh = make_mesh(cfg.Mesh())
    params = source.params(config, mesh)
    params = jax.jit(lambda p: unstack(p, config), out_shardings=replicated(mesh))(params)
    return Opened(Engine(config, stops, sampling, slots=slots), params, tokenizer)


def answer(name: str, message: str, options: cfg.Decode) -> None:
    """Prints the model's answer to one user message while it is being written."""
    opened = open_model(name, options, slots=1)
    chat = chats.resolve(opened.tokenizer, options.template, options.system_prompt)
    prompt = opened.tokenizer.encode(chat.render_prompt(Example(message)))
    stops, written, seen = opened.engine.stop_ids, "", []

    def show(prompt_index: int, sample_index: int, tokens: Iterable[int]) -> None:
        nonlocal written
        seen.extend(int(t) for t in tokens if int(t) not in stops)
        text = opened.tokenizer.decode(seen)
        # A multi-byte character may still lack its last bytes.
        whole = text[: -len("\ufffd")] if text.endswith("\ufffd") else text
        sys.stdout.write(whole[len(written) :])
        sys.stdout.flush()
        written = whole

    opened.engine.generate(opened.params, [prompt], group_size=1, seed=options.seed, step=0, on_tokens=show)
    print()


def measure(name: str, task: str, samples: int, options: cfg.Task) -> tuple[dict, list[dict]]:
    """Accuracy of a model on a task's problems, and every completion."""
    opened = open_model(name, options, options.slots)
    data = cfg.Data(
        source=task, split=options.split or ("eval" if splits_itself(task) else "test"), max_rows=options.problems,
        system_prompt=options.system_prompt, template=options.template,
    )  # fmt: skip
    prompts = load_prompts(data, opened.tokenizer, options.seed)
    grader = rewards.get(options.grader)
    return evaluate(opened.engine, opened.params, prompts, opened.tokenizer, grader, samples, options.seed)
