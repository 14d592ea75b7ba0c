"""The field's own harness, lm-evaluation-harness, on a model of this project: extra ``eval``.

    python -m jaxreason.harness run --model jaxreason --model_args pretrained=runs/grpo --tasks arc_easy

is ``lm_eval`` with one more model, ``jaxreason``; all of its own flags and tasks work.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.model import ModelConfig, hidden
from jaxreason.model.decoder import head_kernel
from jaxreason.sampler import Job, Sampling
from jaxreason.serve import open_model
from jaxreason.sharding import make_mesh
from jaxreason.terminal import Working

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UserError(f"jaxreason.harness needs lm-evaluation-harness ({error}): pip install 'jaxreason[eval]'") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_CHUNK = 128  # tokens whose logits exist at once
_BUCKET = 64  # rows are padded to a multiple of this, so that few shapes are compiled
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, None: not to be cached; context; continuation


class Harness(TemplateLM):
    """A run, checkpoint, Hugging Face directory or hub id as lm_eval asks models.

    Args:
      pretrained: the model.
      batch_size: rows of one forward pass, and sequences decoded at once.
      max_length: tokens of a context with its continuation; null: the model's positions, at most 4096.
      max_gen_toks: tokens of an answer where a task names no limit.
      dtype: of the matrix products; log-likelihoods are float32 always.
      max_batch_size, device: lm_eval passes them to every model. Where this one runs is JAX's choice (``JAX_PLATFORMS``).
    """

    def __init__(
        self, pretrained: str, batch_size: int | str = 8, max_length: int | None = None, max_gen_toks: int = 256,
        dtype: str = "float32", max_batch_size: int | None = None, device: str | None = None,
    ):  # fmt: skip
        super().__init__()
        if str(batch_size).partition(":")[0] == "auto":
            batch_size = 8
        opened = open_model(pretrained, cfg.Decode.model_validate({"compute_dtype": dtype, "slots": int(batch_size)}))
        self._model, self._sampler, self._own = opened.config, opened.sampler, opened.tokenizer
        params = opened.source.params(opened.config, make_mesh(cfg.Mesh()))
        self._params = params
        self._sampler.load(params, step=0)
        self.tokenizer, self.batch_size, self.max_gen_toks = opened.tokenizer.hf, int(batch_size), int(max_gen_toks)
        self.max_length = int(max_length or min(opened.config.arch.max_positions, 4096))
        self._score = jax.jit(_score, static_argnums=1)

    # ---- what the shared part of lm_eval asks for

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.eos_token_id
        return self._own.stop_ids[0] if found is None else found

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._own.bos_id is None else self._own.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As the tokenizer does it by itself; a text that begins with the BOS gets no second one."""
        bos = self.tokenizer.bos_token
        given = add_special_tokens is None and bos is not None and string.startswith(bos)
        return self.tokenizer.encode(string, add_special_tokens=False if given else add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None if chat_template is False else self.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        assert isinstance(text, str)  # of one conversation that is not tokenized
        return text

    # ---- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probs, whether every token of it is the most likely one) of each request.

        What is too long loses tokens from the left. Raises UserError for a continuation without a token of its own.
        """
        if empty := [request[0] for request in requests if not request[2]]:
            raise UserError(f"lm_eval asks for a continuation that adds no token to its context: {empty[0]!r}; change the task")
        rows = [((context + continuation)[-(self.max_length + 1) :], len(continuation)) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with Working("log-likelihoods", len(rows)) as show:
            for at in range(0, len(order), self.batch_size):
                members = order[at : at + self.batch_size]
                tokens = self._padded([rows[i][0] for i in members])
                logp, best = map(np.asarray, self._score(self._params, self._model, tokens))
                for row, i in enumerate(members):
                    ids, count = rows[i]
                    part = slice(len(ids) - 1 - count, len(ids) - 1)
                    found[i] = float(logp[row, part].sum(dtype=np.float64)), bool(best[row, part].all())
                show(at + len(members))
        for request, result in zip(requests, found):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return found

    def _padded(self, rows: Sequence[list[int]]) -> np.ndarray:
        """[batch_size, T] int32, right-padded: what comes later changes nothing before it."""
        length = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
        tokens = np.full((self.batch_size, length), self._own.pad_id, np.int32)
        for at, ids in enumerate(rows):
            tokens[at, : len(ids)] = ids
        return tokens

    def loglikelihood_rolling(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap."""
        windows: list[Encoded] = []
        owners = []
        for owner, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            for context, continuation in map(utils.make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[owner] += value
        return sums

    # ---- texts

    def generate_until(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Completions that end before the first of a request's stop texts."""
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for sampling, members in groups.items():
            room = self._model.arch.max_positions - sampling.max_completion_tokens
            prompts = [self.tok_encode(requests[i].args[0])[-min(room, self.max_length) :] for i in members]
            with Working("completions", len(members)) as show:
                job = Job(sampling, slots=self.batch_size)
                drawn = self._sampler.generate(prompts, job, lambda done, _, tokens: show(done, f"{tokens} tokens"))
            for index, completion in zip(members, drawn):
                tokens = completion.tokens if completion.truncated else completion.tokens[:-1]
                texts[index] = _cut(self._own.decode(tokens, skip_special_tokens=True), requests[index].args[1].get("until"))
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        limit = given.get("max_gen_toks", given.get("max_new_tokens", given.get("max_tokens", self.max_gen_toks)))
        heat = float(given.get("temperature", 0.0)) if given.get("do_sample", given.get("temperature", 0.0) > 0) else 0.0
        return Sampling(int(limit), heat, float(given.get("top_p", 1.0)), int(given.get("top_k", 0) or 0))


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.partition(stop)[0]
    return text


def _score(params: dict, config: ModelConfig, tokens: Array) -> tuple[Array, Array]:
    """Log-prob of every next token and whether it is the most likely one, [B, T − 1] each; logits of a chunk at a time."""
    x, head = hidden(params, config, tokens)[:, :-1], head_kernel(params, config)
    targets = tokens[:, 1:]
    pad = -x.shape[1] % _CHUNK
    x, y = jnp.pad(x, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))
    pieces = x.reshape(x.shape[0], -1, _CHUNK, x.shape[2]).swapaxes(0, 1), y.reshape(y.shape[0], -1, _CHUNK).swapaxes(0, 1)

    def one(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        z = jnp.einsum("btd,vd->btv", piece[0], head.astype(piece[0].dtype), preferred_element_type=jnp.float32)
        at = jnp.take_along_axis(z, piece[1][..., None], axis=2)[..., 0]
        return at - jax.nn.logsumexp(z, axis=2), z.argmax(axis=2) == piece[1]

    logp, best = (found.swapaxes(0, 1).reshape(y.shape)[:, : targets.shape[1]] for found in lax.map(one, pieces))
    return logp, best


def main() -> None:
    """``lm_eval`` itself, which now knows the model ``jaxreason``."""
    from lm_eval.__main__ import cli_evaluate

    from jaxreason import xla

    register_model("jaxreason")(Harness)
    xla.leave_out_absent_gpu()
    sys.argv[0] = "jaxreason.harness"
    cli_evaluate()


if __name__ == "__main__":
    main()
