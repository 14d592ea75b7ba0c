"""One chat template for training and generation.

The prompt is what generation renders; the completion is the rest of the full conversation's text. So the model is
trained on exactly the text that it is later asked to continue, and the thought is never lost on the way.
"""

import dataclasses
import functools
import re
from pathlib import Path

from jaxreason.config import Problems
from jaxreason.data import render
from jaxreason.data.example import Example, Reject
from jaxreason.data.tokenizer import EMBEDDED, Tokenizer
from jaxreason.errors import UserError
from jaxreason.paths import expanded
from jaxreason.text import LITERAL_CLOSE, LITERAL_OPEN, THINK_OPEN

TEMPLATES = Path(__file__).resolve().parent / "templates"

DATE_STRING = f"{render.DATE:%d %b %Y}"

_PROBE = "\u2402probe\u2403"  # stands for the assistant's text where a template rewrites it


class Refused(UserError, Reject):
    """The template does not render this conversation: a message where it is the only one, a reject where it is one of many."""

    def __init__(self, message: str, words: str):
        Reject.__init__(self, "the chat template refuses the row", words)
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat template with the tokenizer's special tokens, ready to render.

    Every method raises Refused for a conversation that the template does not render, and UserError where rendering takes too
    long or too much memory.
    """

    template: str
    origin: str  # for messages: where the template comes from
    tokens: tuple[tuple[str, str], ...]  # bos_token, eos_token … as templates see them
    system_prompt: str | None = None
    control: tuple[str, ...] = ()  # texts of control tokens, which somebody's text may hold only as the characters they are

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
        self.check_reply(reply)
        whole = self._render([*self._messages(example), {"role": "assistant", "content": reply}], False)
        completion = whole[len(prompt) :] if whole.startswith(prompt) else ""
        if reply.removeprefix(_opened(prompt, reply)) in completion:
            return prompt, completion
        return prompt, self._around_probe(example, prompt, reply)

    def check_reply(self, text: str) -> None:
        """Raises Reject for a control token inside a text that is trained: the model would learn to write it there."""
        if LITERAL_OPEN in self._literal(text):
            raise Reject("control token inside the answer")

    def _literal(self, text: str) -> str:
        """``text`` with its control tokens marked as characters, see ``Tokenizer.encode_batch``."""
        if LITERAL_OPEN in text or LITERAL_CLOSE in text:
            raise Reject("a character that Unicode keeps out of texts (U+FDD0, U+FDD1)")
        return _pattern(self.control).sub(rf"{LITERAL_OPEN}\g<0>{LITERAL_CLOSE}", text)

    def _around_probe(self, example: Example, prompt: str, reply: str) -> str:
        """The completion for a template that rewrites the assistant's text, e.g. drops its thought.

        What the template puts around a text without a thought is kept, the text itself is the example's. A template
        that opens the thought in the generation prompt has written the beginning of the text already.
        """
        whole = self._render([*self._messages(example), {"role": "assistant", "content": _PROBE}], False)
        before, found, after = whole.partition(_PROBE)
        if not found or not prompt.startswith(before):
            words = (
                "the generation prompt is not how the rendered conversation begins: prompt ends with "
                f"{prompt[-60:]!r}, conversation continues {before[-60:]!r}"
            )
            fix = f"set data.template to a Jinja file, or to one of {', '.join(shipped())}"
            raise Refused(f"chat template {self.origin}: {words}; {fix}", words)
        opened = prompt[len(before) :]
        if not reply.startswith(opened):
            raise Reject("template opens a thought that the row does not have")
        return reply[len(opened) :] + after

    def _messages(self, example: Example) -> list[dict[str, str]]:
        system = self.system_prompt if example.system is None else self._literal(example.system)
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns += [{"role": role, "content": self._literal(text)} for role, text in example.history]
        return [*turns, {"role": "user", "content": self._literal(example.question)}]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            # Of our own templates the bounds are known, and a process costs a tenth of a millisecond a text.
            render_in = render.here if self.template in _ours() else render.apart
            return render_in(self.template, values | {"date_string": DATE_STRING} | dict(self.tokens))
        except render.TemplateFailed as error:
            message = f"chat template {self.origin}: {error}; set data.template to one that fits"
            raise (UserError(message) if isinstance(error, render.TemplateKilled) else Refused(message, str(error))) from None


def of_data(data: Problems, tokenizer: Tokenizer) -> Chat:
    """The chat of a config's section ``data``. Raises UserError."""
    return resolve(tokenizer, data.template, data.system_prompt, data.trust_special_tokens)


def resolve(tokenizer: Tokenizer, template: str | None = None, system_prompt: str | None = None, trust: bool = False) -> Chat:
    """The template that ``data.template`` means: a Jinja file, a shipped one by name, or (None) the tokenizer's own.

    A Llama-3 base tokenizer has no template of its own; it gets the shipped ``llama3``. Raises UserError.

    Args:
      trust: special tokens that texts of rows hold are tokens (``data.trust_special_tokens``), not characters.
    """
    tokens = tuple(sorted((k, str(v)) for k, v in tokenizer.hf.special_tokens_map.items() if isinstance(v, str)))
    if template is not None:
        text, origin = _read(template)
    elif tokenizer.hf.chat_template:
        text, origin = _own(tokenizer), f"of tokenizer {tokenizer.hf.name_or_path}"
    elif {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= tokenizer.hf.get_vocab().keys():
        text, origin = _read("llama3")
    else:
        raise UserError(
            f"tokenizer {tokenizer.hf.name_or_path} has no chat template; set data.template to a Jinja file, or to one "
            f"of {', '.join(shipped())}"
        )
    chat = Chat(text, origin, tokens, system_prompt, () if trust else tokenizer.control)
    _check_bos(chat, tokenizer, own=template is None)
    return chat


def _own(tokenizer: Tokenizer) -> str:
    try:
        text = tokenizer.hf.get_chat_template()
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # of named ones, none of which is the default
        reason = str(error).split("\n")[0]
    else:
        if isinstance(text, str):
            return text
        reason = f"it is a {type(text).__name__}"
    raise UserError(f"chat template of tokenizer {tokenizer.hf.name_or_path}: {reason}; set data.template to a Jinja file")


def shipped() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def _read(template: str) -> tuple[str, str]:
    path = expanded(template, "data.template")
    if not path.is_file() and template in shipped():
        path = TEMPLATES / f"{template}.jinja"
    if not path.is_file():
        raise UserError(f"data.template {template}: no such file; give a Jinja file or one of {', '.join(shipped())}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template {path}: cannot be read as UTF-8 text: {error}") from None


@functools.cache
def _ours() -> frozenset[str]:
    """The texts of the templates that come with this package."""
    files = [*TEMPLATES.glob("*.jinja"), EMBEDDED / "chat_template.jinja"]
    return frozenset(file.read_text(encoding="utf-8") for file in files)


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


@functools.lru_cache(maxsize=8)
def _pattern(control: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, control)) or "(?!)")
