"""One chat template for training and generation.

The prompt is what generation renders; the completion is the rest of the full conversation's text. So the model is
trained on exactly the text that it is later asked to continue, and the thought is never lost on the way.
"""

import dataclasses
import datetime
import functools
import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxreason.data.example import Example, Reject
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import UserError
from jaxreason.text import THINK_OPEN

TEMPLATES = Path(__file__).resolve().parent / "templates"

# Llama-3.2's template writes today's date into the system message: the same row must give the same tokens on any day.
DATE = datetime.datetime(2024, 7, 26)
DATE_STRING = "26 Jul 2024"

_PROBE = "\u2402probe\u2403"  # stands for the assistant's text where a template rewrites it


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat template with the tokenizer's special tokens, ready to render.

    Raises UserError from every method for a template that cannot be rendered.
    """

    template: str
    origin: str  # for messages: where the template comes from
    tokens: tuple[tuple[str, str], ...]  # bos_token, eos_token … as templates see them
    system_prompt: str | None = None

    def render_prompt(self, example: Example) -> str:
        """The text up to where the assistant begins. Plain text has no prompt but the BOS, see ``encode``."""
        return self._render(self._messages(example), True)

    def render(self, example: Example) -> tuple[str, str]:
        """(prompt, completion) of an example with an answer; the completion holds the whole thought and answer.

        Raises Reject for an example without an answer, and where the template opens a thought that it does not have.
        """
        prompt, reply = self.render_prompt(example), example.reply
        if reply is None:
            raise Reject("no answer to train on")
        whole = self._render([*self._messages(example), {"role": "assistant", "content": reply}], False)
        completion = whole[len(prompt) :] if whole.startswith(prompt) else ""
        if reply.removeprefix(_opened(prompt, reply)) in completion:
            return prompt, completion
        return prompt, self._around_probe(example, prompt, reply)

    def _around_probe(self, example: Example, prompt: str, reply: str) -> str:
        """The completion for a template that rewrites the assistant's text, e.g. drops its thought.

        What the template puts around a text without a thought is kept, the text itself is the example's. A template
        that opens the thought in the generation prompt has written the beginning of the text already.
        """
        whole = self._render([*self._messages(example), {"role": "assistant", "content": _PROBE}], False)
        before, found, after = whole.partition(_PROBE)
        if not found or not prompt.startswith(before):
            raise UserError(
                f"chat template {self.origin}: the generation prompt is not how the rendered conversation begins: "
                f"prompt ends with {prompt[-60:]!r}, conversation continues {before[-60:]!r}; set data.template to a "
                f"Jinja file, or to one of {', '.join(shipped())}"
            )
        opened = prompt[len(before) :]
        if not reply.startswith(opened):
            raise Reject("template opens a thought that the row does not have")
        return reply[len(opened) :] + after

    def _messages(self, example: Example) -> list[dict[str, str]]:
        system = self.system_prompt if example.system is None else example.system
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns += [{"role": role, "content": text} for role, text in example.history]
        return [*turns, {"role": "user", "content": example.question}]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return _compile(self.template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                date_string=DATE_STRING,
                **dict(self.tokens),
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"chat template {self.origin}: {error}; set data.template to one that fits") from None


def resolve(tokenizer: Tokenizer, template: str | None = None, system_prompt: str | None = None) -> Chat:
    """The template that ``data.template`` means: a Jinja file, a shipped one by name, or (None) the tokenizer's own.

    A Llama-3 base tokenizer has no template of its own; it gets the shipped ``llama3``. Raises UserError.
    """
    tokens = tuple(sorted((k, str(v)) for k, v in tokenizer.hf.special_tokens_map.items() if isinstance(v, str)))
    if template is not None:
        text, origin = _read(template)
    elif tokenizer.hf.chat_template:
        text, origin = tokenizer.hf.get_chat_template(), f"of tokenizer {tokenizer.hf.name_or_path}"
    elif {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= tokenizer.hf.get_vocab().keys():
        text, origin = _read("llama3")
    else:
        raise UserError(
            f"tokenizer {tokenizer.hf.name_or_path} has no chat template; set data.template to a Jinja file, or to one "
            f"of {', '.join(shipped())}"
        )
    chat = Chat(text, origin, tokens, system_prompt)
    _check_bos(chat, tokenizer, own=template is None)
    return chat


def shipped() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def _read(template: str) -> tuple[str, str]:
    path = Path(template).expanduser()
    if not path.is_file() and template in shipped():
        path = TEMPLATES / f"{template}.jinja"
    if not path.is_file():
        raise UserError(f"data.template {template}: no such file; give a Jinja file or one of {', '.join(shipped())}")
    return path.read_text(), str(path)


def _check_bos(chat: Chat, tokenizer: Tokenizer, own: bool) -> None:
    """A tokenizer's own template is taken as its model was trained; one from a file must write a BOS that is due."""
    ids = tokenizer.encode(chat.render_prompt(Example("x")))
    if tokenizer.bos_id is None:
        return
    if ids[:2] == [tokenizer.bos_id] * 2:
        raise UserError(f"chat template {chat.origin}: begins with two BOS tokens; remove one {{{{ bos_token }}}}")
    if not own and tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
        raise UserError(
            f"chat template {chat.origin}: writes no BOS, though the tokenizer begins every text with "
            f"{tokenizer.hf.bos_token}; put {{{{ bos_token }}}} first"
        )


def _opened(prompt: str, reply: str) -> str:
    """The opening of the thought that both end the prompt and begin the reply, because the template wrote it."""
    for opening in (f"{THINK_OPEN}\n", THINK_OPEN):
        if prompt.endswith(opening) and reply.startswith(opening):
            return opening
    return ""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for other trainers; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compiled as transformers does it, sandboxed, but with the clock pinned."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    return environment.from_string(template)
