"""Tree of Thoughts (arXiv 2305.10601): thoughts are proposed, judged, and searched breadth first or depth first."""

import dataclasses
from collections.abc import Generator, Hashable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from jaxreason.evaluate.ask import Ask, Final, Query, Reply, Search
from jaxreason.evaluate.strategies.sampled import Count, warm
from jaxreason.evaluate.strategies.spaces import Free, Numbers, Space, State, ballot, counted, value
from jaxreason.sampler import Sampling

Threshold = Annotated[float, Field(ge=0)]


@dataclasses.dataclass
class Node:
    """A state in the tree, as it is saved."""

    id: int
    parent: int | None
    depth: int
    state: State
    value: float | None = None
    visit: int | None = None  # when it was expanded, from 0
    fate: Literal["open", "kept", "pruned", "dropped", "duplicate", "solution", "end"] = "open"

    def plain(self) -> dict[str, Any]:
        text = self.state.end if self.state.end is not None else self.state.text
        return {"id": self.id, "parent": self.parent, "depth": self.depth, "text": text, "value": self.value, "visit": self.visit,
                "fate": self.fate}  # fmt: skip


class Tree:
    """What both searches do: grow a node, judge states with a cache, keep the record of every node."""

    def __init__(self, query: Query, space: Space, thinking: Sampling, judging: Sampling, judges: int, thoughts: int):
        self.query, self.space = query, space
        self._thinking, self._judging, self._judges, self._thoughts = thinking, judging, judges, thoughts
        self._cache: dict[Hashable, float] = {}
        self._asked = self._visits = 0
        self.nodes = [Node(0, None, 0, space.root(), fate="kept")]

    def expand(self, nodes: Sequence[Node]) -> Generator[Ask, list[list[Reply]], list[Node]]:
        """The children of nodes, all asked for at once. A state that another child of these already is, is a duplicate."""
        for node in nodes:
            node.visit, self._visits = self._visits, self._visits + 1
        replies = yield Ask(tuple(self.space.grow(node.state) for node in nodes), self._thinking, self._thoughts)
        seen: set = set()
        children = []
        for node, mine in zip(nodes, replies):
            for state in self.space.children(node.state, mine):
                child = Node(len(self.nodes), node.id, node.depth + 1, state)
                self.nodes.append(child)
                if state.key in seen:
                    child.fate = "duplicate"
                    continue
                seen.add(state.key)
                child.fate = "solution" if state.solved else "open"
                children.append(child)
        return children

    def judge(self, nodes: Sequence[Node]) -> Generator[Ask, list[list[Reply]], None]:
        """Gives every node its value, a state's once. A puzzle's last number that is not the target is worth nothing, unasked."""
        new: dict[Hashable, State] = {}
        for node in nodes:
            state = node.state
            if state.end is not None and not state.solved and self.query.target is not None:
                self._cache[state.key] = 0.0
            if state.key not in self._cache:
                new.setdefault(state.key, state)
        if new:
            self._asked += len(new)
            replies = yield Ask(tuple(self.space.judge(state) for state in new.values()), self._judging, self._judges)
            self._cache |= {key: value([reply.text for reply in mine]) for key, mine in zip(new, replies)}
        for node in nodes:
            node.value = self._cache[node.state.key]

    def vote(self, nodes: Sequence[Node]) -> Generator[Ask, list[list[Reply]], None]:
        """Gives every node its share of the judges' votes among them all."""
        replies = yield Ask((ballot(self.query, [node.state for node in nodes]),), self._judging, self._judges)
        for node, votes in zip(nodes, counted([reply.text for reply in replies[0]], len(nodes))):
            node.value = votes / self._judges

    def best_end(self) -> Node | None:
        """The end of the highest value, the first of equals."""
        ends = [node for node in self.nodes if node.state.end is not None and node.fate != "duplicate"]
        return max(ends, key=lambda node: (node.state.solved, node.value or 0.0), default=None)

    def final(self, last: Node | None = None) -> tuple[Final, ...]:
        """The answer and the tree; without an end, the text of the most promising node, unfinished."""
        node = self.best_end()
        if node is None:
            node = last or max(self.nodes, key=lambda n: (n.depth, n.value or 0.0))
        end = node.state.end
        tree = {"nodes": [n.plain() for n in self.nodes], "answer": node.id, "visits": self._visits, "judged": self._asked}
        return (Final(node.state.text if end is None else end, end is None, details={"tree": tree}),)


def _tree(
    query: Query, depth: int, thoughts: int, judges: int, judge_tokens: int, thought_tokens: int | None
) -> Tree:
    space: Space = Numbers(query) if query.target is not None else Free(query, depth)
    warmed = warm(query.sampling, None)
    thinking = dataclasses.replace(warmed, max_completion_tokens=thought_tokens or query.sampling.max_completion_tokens)
    # A puzzle's steps are proposed together by one reply, a free thought is one line of each of several.
    return Tree(query, space, thinking, dataclasses.replace(warmed, max_completion_tokens=judge_tokens), judges, thoughts)


def bfs(
    query: Query, *, breadth: Count = 5, judges: Count = 3, thoughts: Count | None = None, depth: Count = 8,
    evaluate: Literal["value", "vote"] = "value", select: Literal["greedy", "sample"] = "greedy", prune: Threshold = 0.0,
    judge_tokens: Count = 64, thought_tokens: Count | None = None,
) -> Search:  # fmt: skip
    """Level by level: every kept node is expanded, the children are judged, and ``breadth`` of them are kept.

    Args:
      breadth: nodes that a level keeps; 1 is greedy.
      judges: replies that judge a state (value), or vote among a level's states (vote).
      thoughts: replies that propose; null: 1 for a puzzle, whose reply lists steps, and ``breadth`` for a free question.
      depth: most lines of a free answer; a puzzle has one step less than numbers.
      evaluate: each state by itself (sure 20, likely 1, impossible 0.001, the mean over judges), or by votes among a level.
      select: the best, or drawn by value.
      prune: nodes of a lower value are given up.
      judge_tokens, thought_tokens: limits of one reply; null: max_completion_tokens.
    A puzzle's search stops at the first solution, a free one when its level has nothing but ends.
    """
    thoughts = thoughts or (1 if query.target is not None else breadth)
    tree = _tree(query, depth, thoughts, judges, judge_tokens, thought_tokens)
    rng = np.random.default_rng([query.seed, len(query.example.question)])
    level = tree.nodes[:1]
    for _ in range(tree.space.depth):
        open_nodes = [node for node in level if node.state.end is None]
        if not open_nodes:
            break
        children = yield from tree.expand(open_nodes)
        if any(node.state.solved for node in children):
            return tree.final()
        candidates = [node for node in level if node.state.end is not None] + children
        if not candidates:
            break
        yield from (tree.judge(candidates) if evaluate == "value" else tree.vote(candidates))
        level = _kept(candidates, breadth, select, prune, rng)
    return tree.final(level[0] if level else None)


def _kept(nodes: list[Node], breadth: int, select: str, prune: float, rng: np.random.Generator) -> list[Node]:
    """The nodes of a level that live on, best first; the fate of every one is recorded."""
    alive = []
    for node in nodes:
        node.fate = "dropped" if (node.value or 0.0) >= prune else "pruned"
        if node.fate == "dropped":
            alive.append(node)
    if select == "sample" and len(alive) > breadth:
        weights = np.array([node.value for node in alive]) + 1e-9
        drawn = rng.choice(len(alive), breadth, replace=False, p=weights / weights.sum())
        kept = [alive[i] for i in drawn]
    else:
        kept = sorted(alive, key=lambda node: -(node.value or 0.0))[:breadth]
    for node in kept:
        node.fate = "kept" if node.state.end is None else "end"
    return kept


def dfs(
    query: Query, *, breadth: Count = 3, visits: Count = 100, judges: Count = 3, thoughts: Count | None = None, depth: Count = 8,
    prune: Threshold = 0.5, judge_tokens: Count = 64, thought_tokens: Count | None = None,
) -> Search:  # fmt: skip
    """The most promising child first; where a node has none left, back to its parent's next one.

    Args:
      breadth: children of a node that are tried, the best ones.
      visits: nodes that are expanded at most.
      prune: children of a lower value are never tried; 0.5: those that most judges call impossible.
      judges, thoughts, depth, judge_tokens, thought_tokens: as in :func:`bfs`.
    The search stops at the first solution of a puzzle, and at the first end of a free question.
    """
    thoughts = thoughts or (1 if query.target is not None else breadth)
    tree = _tree(query, depth, thoughts, judges, judge_tokens, thought_tokens)
    stack, expanded = tree.nodes[:1], set()
    done = 0
    while stack and done < visits:
        node = stack.pop()
        if node.state.end is not None:
            node.fate = "end"
            if query.target is None:
                return tree.final(node)
            continue
        if node.depth >= tree.space.depth:
            continue
        if node.state.key in expanded:
            node.fate = "duplicate"  # what can be made of it was tried already
            continue
        expanded.add(node.state.key)
        done += 1
        children = yield from tree.expand([node])
        if any(child.state.solved for child in children):
            return tree.final()
        yield from tree.judge(children)
        ranked = sorted(children, key=lambda child: -(child.value or 0.0))
        tried = [child for child in ranked if (child.value or 0.0) >= prune][:breadth]
        for child in children:
            child.fate = "kept" if child in tried else "dropped" if (child.value or 0.0) >= prune else "pruned"
        stack += reversed(tried)
    return tree.final()


