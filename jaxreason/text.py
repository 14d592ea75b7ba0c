r"""How a reasoning model's text is marked up: the tags of thought and answer, and ``\boxed{}``."""

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

# Around what looks like a control token in somebody's text and is to be encoded as the characters that it is. Unicode keeps
# both for a program's own use: no text has them.
LITERAL_OPEN, LITERAL_CLOSE = "\ufdd0", "\ufdd1"

MAX_ANSWER_CHARS = 2000
"""A longer text is not an answer: it is not read, so that 100 kB in a box cost nothing."""

# What TeX calls \boxed 5: a number, a letter or a fraction without braces.
_BARE = (
    r"[+-]?[0-9]+(?:[.,/][0-9]+)*|\\[dt]?frac\s*(?:\{[^{}]*\}|[0-9])\s*(?:\{[^{}]*\}|[0-9])|\\pi(?![A-Za-z])"
    r"|(?<=\s)[A-Za-z](?![A-Za-z])"
)
_BOX_TOKEN = re.compile(rf"(?P<box>\\f?boxed\s*\{{)|\\f?boxed\s*(?P<bare>{_BARE})|\\.|[{{}}]", re.DOTALL)
_BOX = re.compile(r"\\f?boxed(?![A-Za-z])")
_WHOLE_BOX = re.compile(r"\\f?boxed\s*\{(.*)\}", re.DOTALL)


def without_marks(text: str) -> str:
    """A rendered text as people and graders read it."""
    return text.replace(LITERAL_OPEN, "").replace(LITERAL_CLOSE, "")


def has_box(text: str) -> bool:
    r"""Whether ``\boxed`` or ``\fboxed`` occurs, closed or not."""
    return _BOX.search(text) is not None


def boxed(text: str) -> list[str] | None:
    r"""Contents of the outermost ``\boxed{...}`` in order, braces balanced; None if any box is left open.

    ``\boxed 5`` is read, too: a number, a letter or a fraction without braces.
    One pass, so nothing is quadratic. Escaped braces do not count, unmatched braces outside of boxes are ignored.
    """
    found, stack, boxes_open = [], [], 0
    for token in _BOX_TOKEN.finditer(text):
        if token["box"] or token[0] == "{":
            stack.append((bool(token["box"]), token.end()))
            boxes_open += bool(token["box"])
        elif token["bare"]:
            if not boxes_open:
                found.append(token["bare"])
        elif token[0] == "}" and stack:
            is_box, start = stack.pop()
            boxes_open -= is_box
            if is_box and not boxes_open:
                found.append(text[start : token.start()].strip())
    return None if boxes_open else found


def unwrap(content: str) -> str:
    r"""``\boxed{\boxed{5}}`` is 5; a text too long to be read is left, since each layer costs a pass."""
    while len(content) <= MAX_ANSWER_CHARS:
        match = _WHOLE_BOX.fullmatch(content)
        if match is None or len(boxed(content) or []) != 1:
            break
        content = match[1].strip()
    return content


_EMPHASIS = [
    (re.compile(pattern), r"\1")
    for pattern in (
        r"(?<![\w)*])\*\*(?=[^\s*])([^*]{1,500}?)(?<=\S)\*\*(?![\w(*])",
        r"(?<![\w)*])\*(?=[^\s*])([^*]{1,500}?)(?<=\S)\*(?![\w(*])",
        r"(?<!\w)__(?=[^\s_])([^_]{1,500}?)(?<=\S)__(?!\w)",
        r"`([^`]{1,500})`",
    )
]


def without_emphasis(text: str) -> str:
    """A short text without Markdown's marks of emphasis and code; ``2**10`` keeps its stars."""
    for pattern, replacement in _EMPHASIS:
        text = pattern.sub(replacement, text)
    return text.strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, itself without a box; None where there is none, it is empty, or one is open."""
    found = boxed(text)
    return (unwrap(found[-1]) or None) if found else None
