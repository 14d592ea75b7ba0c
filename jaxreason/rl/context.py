"""What a teacher is told that the policy is not, and the prompt that it then reads.

The teacher may be the policy itself: told the answer (OPSD, arXiv 2601.18734), a demonstration (SDFT, 2601.19897) or a right
completion of the same prompt (SDPO, 2601.20802), it is a better judge of the policy's samples than the policy alone.
"""

import dataclasses
import re
from collections.abc import Callable
from collections.abc import Sequence as Many

from jaxreason import config as cfg
from jaxreason import plugins
from jaxreason.data.chat import Chat, Refused
from jaxreason.data.example import Reject
from jaxreason.data.prompts import Prompt, Prompts
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import UserError
from jaxreason.rl import turns
from jaxreason.rl.sequence import Groups, Sequence

Context = Callable[[Sequence, list[Sequence]], str | None]


def answer(sequence: Sequence, group: list[Sequence]) -> str | None:
    """The gold answer."""
    return sequence.prompt.gold


def solution(sequence: Sequence, group: list[Sequence]) -> str | None:
    """The row's own answer with its thought."""
    return sequence.prompt.reply


def peer(sequence: Sequence, group: list[Sequence]) -> str | None:
    """The first other completion of the prompt that is right by the first reward function; None: there is none."""
    right = (s for s in group if s is not sequence and s.drawn and turns.is_right(s))
    return next((s.text for s in right), None)


CONTEXTS: dict[str, Context] = {"answer": answer, "solution": solution, "peer": peer}


@dataclasses.dataclass(frozen=True)
class TeacherPrompts:
    """Gives every sequence the prompt that the teacher reads."""

    settings: cfg.Teacher
    context: Context
    chat: Chat
    tokenizer: Tokenizer
    max_more: int  # tokens by which it may be longer than the policy's

    def __call__(self, groups: Groups) -> Groups:
        """The groups with ``teacher_ids``: () where the teacher has nothing to say, or too much."""
        return [[dataclasses.replace(s, teacher_ids=self._ids(s, group)) for s in group] for group in groups]

    def _ids(self, sequence: Sequence, group: list[Sequence]) -> tuple[int, ...]:
        try:
            told = self.context(sequence, group)
        except Exception as error:
            raise UserError(f"teacher.context {self.settings.context}: {type(error).__name__}: {error}") from error
        if told is None:
            return ()
        if not isinstance(told, str):
            found = type(told).__name__
            raise UserError(f"teacher.context {self.settings.context}: returned a {found}; it returns a text or None")
        ids = self.of(sequence.prompt, told)
        return ids if len(ids) <= len(sequence.prompt.ids) + self.max_more else ()

    def of(self, prompt: Prompt, told: str) -> tuple[int, ...]:
        """The tokens of ``prompt`` for a teacher that is told ``told``; none where that cannot be said in a prompt."""
        said = {"{question}": prompt.user, "{context}": turns.without_control(told, self.tokenizer)}
        user = re.sub("|".join(map(re.escape, said)), lambda found: said[found[0]], self.settings.prompt)
        try:
            return tuple(self.tokenizer.encode(self.chat.render_prompt(prompt.instead(user))))
        except Refused:
            raise
        except Reject:
            return ()


def teacher_prompts(config: cfg.GrpoConfig, prompts: Prompts, chat: Chat, tokenizer: Tokenizer) -> TeacherPrompts | None:
    """What the config's teacher reads; None: what the policy reads. Raises UserError."""
    settings = config.teacher
    if settings.context is None:
        return None
    if ":" in settings.context:
        if settings.max_context_tokens is None:
            raise UserError(
                f"teacher.context {settings.context} is your own: set teacher.max_context_tokens to the most tokens by which it "
                "makes a prompt longer"
            )
        context = plugins.load(settings.context, "teacher.context")
        return TeacherPrompts(settings, context, chat, tokenizer, settings.max_context_tokens)
    if settings.context not in CONTEXTS:
        known = ", ".join(CONTEXTS)
        near = plugins.nearest(settings.context, CONTEXTS)
        yours = "your own: package.module:function"
        raise UserError(f"teacher.context {settings.context!r} is unknown{near}; built-in: {known}; {yours}")
    found = TeacherPrompts(settings, CONTEXTS[settings.context], chat, tokenizer, settings.max_context_tokens or 0)
    if settings.max_context_tokens is None:
        found = dataclasses.replace(found, max_more=_longest(found, prompts.prompts, config.rollout.max_completion_tokens))
    return found


def _longest(found: TeacherPrompts, prompts: Many[Prompt], max_completion_tokens: int) -> int:
    """Most tokens by which a teacher's prompt is longer than the policy's."""
    if found.settings.context == "peer":
        return max(len(found.of(p, "")) - len(p.ids) for p in prompts[:64]) + max_completion_tokens + turns.SPARE
    told = {"answer": lambda p: p.gold, "solution": lambda p: p.reply or ""}[found.settings.context or ""]
    return max(0, *(len(found.of(p, told(p))) - len(p.ids) for p in prompts))
