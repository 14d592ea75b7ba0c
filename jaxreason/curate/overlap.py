"""How much of a text is in others: the longest common subsequence of words, and runs of words."""

import re
from collections.abc import Iterable, Iterator, Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    """Runs of letters and digits, in lower case."""
    return tuple(_WORD.findall(text.lower()))


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of ``a`` [m] and ``b`` [n].

    Bit i of an integer says whether row i of the table of prefixes does not grow at ``a[i]``: a word of ``b`` costs a few
    operations on m bits instead of m comparisons (Hyyrö, 2004: Bit-parallel LCS-length computation revisited).
    """
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(a)) - 1
    same = full
    for word in b:
        met = same & places.get(word, 0)
        same = ((same + met) | (same - met)) & full
    return len(a) - same.bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence, 2 L / (m + n); 0 where a text has no word (Lin, 2004: ROUGE)."""
    return 2 * common(a, b) / (len(a) + len(b)) if a and b else 0.0


class Novelty:
    """Texts that are kept, of which another may be no near copy: its ROUGE-L with each is at most ``most``."""

    def __init__(self, most: float):
        self._most, self._kept = most, list[tuple[str, ...]]()

    def add(self, text: str) -> None:
        self._kept.append(words(text))

    def refuses(self, text: str) -> bool:
        """Whether the text's ROUGE-L with a kept one is above ``most``."""
        new = words(text)
        for kept in self._kept:
            # L is the shorter length at most, so that texts of very different lengths need not be compared.
            bound = 2 * min(len(new), len(kept)) / max(1, len(new) + len(kept))
            if bound > self._most and rouge_l(new, kept) > self._most:
                return True
        return False


class Contamination:
    """Problems of evaluation sets, of which no other text may hold ``n`` words in a row (GPT-3, arXiv 2005.14165: 13).

    A problem of fewer words has no such run: it is known by a question of exactly the same words.
    """

    def __init__(self, problems: Iterable[str], n: int = 13):
        self._n, self._runs, self._short = n, set[tuple[str, ...]](), set[tuple[str, ...]]()
        for problem in problems:
            found = words(problem)
            if 0 < len(found) < n:
                self._short.add(found)
            self._runs.update(self._of(found))

    def has(self, question: str, trace: str = "") -> bool:
        """Whether the question or the trace holds a run of a problem, or the question is a short problem."""
        asked = words(question)
        return asked in self._short or any(run in self._runs for text in (asked, words(trace)) for run in self._of(text))

    def _of(self, text: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        return (text[start : start + self._n] for start in range(len(text) - self._n + 1))
