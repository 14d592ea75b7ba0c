"""Seconds of a compiled program on a card that is not here: every kernel by what it computes and what it moves.

A matrix product takes its FLOPs at the rate of full tiles, or the time that its operands take to arrive; cuDNN's attention
takes its FLOPs, and its helpers their bytes; every other kernel takes what it reads and writes at the card's bandwidth. The
constants are in ``jaxreason/targets/*.yaml`` and were measured (docs/h100.md).
"""

import collections
import dataclasses
import math

from jaxreason.plan import hlo
from jaxreason.plan.hlo import Instruction
from jaxreason.targets import Target

PRODUCTS, ATTENTION, GRADIENTS, FILLS, COPIES, OTHER = (
    "matrix products", "attention", "adding gradients", "filling memory", "copies and conversions", "other elementwise and sums",
)  # fmt: skip
_FREE = frozenset(("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call",
                   "partition-id", "after-all", "opt-barrier"))  # fmt: skip
_MOVES = frozenset(("copy", "convert", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate",
                    "bitcast", "parameter", "tuple", "get-tuple-element", "constant", "pad"))  # fmt: skip
_INDICES = frozenset(("broadcast", "compare", "select"))  # how XLA writes a place that may be out of bounds
_SLICES = ("dynamic-slice", "slice", "gather")
_THROUGH = ("bitcast", "reshape", "get-tuple-element")
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand holds the update
# Sides of a tile of a product's result, and its rate over that of the largest: smaller ones read their operands more often.
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.85), (64, 128, 0.7), (64, 64, 0.5))


@dataclasses.dataclass(frozen=True)
class Documents:
    """What attention's arrays do not say: of one row, the mean over rows."""

    squares: float  # Σs² over the row's documents of s tokens
    context: float = 0.0  # live positions that a decoding step reads of a sequence
    share: float = 1.0  # a document's part of its row


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of all executions of one instruction."""

    name: str
    kind: str
    times: int
    seconds: float


def costs(text: str, loops: int, target: Target, documents: Documents) -> list[Cost]:
    """The kernels of a compiled program, costliest first.

    Args:
      text: HLO.  loops: rounds of a loop whose end only the data knows, e.g. microbatches.
      target: the card, whose :class:`~jaxreason.targets.Rates` are used.
      documents: lengths of what attention attends to.
    """
    bodies, _ = hlo.computations(text)
    types = {one.name: one.type for body in bodies.values() for one in body}
    found = []
    for one in hlo.instructions(text, loops, share=documents.share):
        if one.kind in _FREE or one.kind.endswith("-done"):
            continue
        kind, seconds = _cost(one, bodies, types, target, documents)
        found.append(Cost(one.name, kind, one.times, one.times * (seconds + target.rates.kernel_seconds)))
    return sorted(found, key=lambda cost: -cost.seconds)


def by_kind(found: list[Cost]) -> dict[str, float]:
    """Seconds by kind, largest first."""
    kinds: dict[str, float] = collections.defaultdict(float)
    for cost in found:
        kinds[cost.kind] += cost.seconds
    return dict(sorted(kinds.items(), key=lambda pair: -pair[1]))


def _cost(
    one: Instruction, bodies: dict[str, list[Instruction]], types: dict[str, str], target: Target, documents: Documents
) -> tuple[str, float]:
    """(kind, seconds of one execution)."""
    if hlo.is_product(one):
        moved = sum(hlo.size(types[name])[0] for name in one.operands) + hlo.size(one.type)[0]
        return PRODUCTS, product_seconds(*hlo.product_shape(one, types), moved, target)
    if one.kind == "custom-call" and "__cudnn" in one.rest:
        return ATTENTION, _attention(one, types, target, documents)
    if one.kind != "fusion":
        moved = sum(sum(hlo.size(types[name])) for name in one.operands) + sum(hlo.size(one.type))
        return _streamed(COPIES if one.kind in _MOVES else OTHER, moved, target)
    body = bodies[one.attribute(r"calls=%?([\w.$-]+)") or ""]
    moved = traffic(body)
    products = [inner for inner in body if hlo.is_product(inner)]
    if products:
        inside = {inner.name: inner.type for inner in body}
        return PRODUCTS, sum(product_seconds(*hlo.product_shape(inner, inside), moved, target) for inner in products)
    return _streamed(_kind(body), moved, target)


def _streamed(kind: str, moved: int, target: Target) -> tuple[str, float]:
    share = target.rates.elementwise if kind == OTHER else target.rates.bandwidth
    return kind, moved / (target.memory_bytes_per_s * share)


def _kind(body: list[Instruction]) -> str:
    kinds = {inner.kind for inner in body}
    sizes = [sum(hlo.size(inner.type)) for inner in body if inner.kind == "parameter"]
    if "broadcast" in kinds and max(sizes, default=0) < 1024 and sum(hlo.size(body[-1].type)) > 2**20:
        return FILLS
    if kinds <= _MOVES:
        return COPIES
    adds = kinds - _MOVES - _INDICES
    return GRADIENTS if "add" in adds and adds <= {"add"} and body[-1].type.startswith("f32") else OTHER


def traffic(body: list[Instruction]) -> int:
    """Bytes that a fusion reads and writes.

    Of an array that is only sliced it reads the slices, and of one that is updated in place it touches the update alone.
    """
    types = {one.name: one.type for one in body}
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for one in body:
        for name in one.operands:
            users[name].append(one)

    def read(name: str) -> int:
        whole, total = sum(hlo.size(types[name])), 0
        for user in users[name]:
            if user.kind in _THROUGH:
                total += read(user.name)
            elif user.kind in _SLICES and user.operands[0] == name:
                total += sum(hlo.size(user.type))
            elif user.kind in _IN_PLACE and user.operands[0] == name:
                total += sum(hlo.size(types[user.operands[2]])) if user.kind == "scatter" else 0
            else:
                return whole
        return min(whole, total)

    def written(name: str) -> int:
        one = next(inner for inner in body if inner.name == name)
        if one.kind == "tuple":
            return sum(map(written, one.operands))
        if one.kind in _THROUGH and one.operands:
            return written(one.operands[0])
        if one.kind in _IN_PLACE:
            return sum(hlo.size(types[one.operands[_IN_PLACE[one.kind]]]))
        return 0 if one.kind == "parameter" else sum(hlo.size(one.type))

    return sum(read(one.name) for one in body if one.kind == "parameter") + written(body[-1].name)


def product_seconds(batch: int, rows: int, columns: int, depth: int, moved: int, target: Target) -> float:
    """Seconds of ``batch`` products [rows, depth]·[depth, columns] that move ``moved`` bytes.

    Tiles of 128 × 256 results are made one a core at a time, so that a last round that is not full takes as long as a full
    one; each tile loses the time of ``product_depth`` more elements of depth. Either order of the tile's sides may be the
    better one.
    """
    rates = target.rates
    per_core = target.bf16_flops_per_s * rates.product / target.cores
    best = math.inf
    for side, other, rate in _TILES:
        rounds = math.ceil(batch * math.ceil(rows / side) * math.ceil(columns / other) / target.cores)
        best = min(best, rounds * 2 * side * other * (depth + rates.product_depth) / (per_core * rate))
    return max(best, moved / (target.memory_bytes_per_s * rates.product_bandwidth))


def _attention(one: Instruction, types: dict[str, str], target: Target, documents: Documents) -> float:
    """cuDNN's kernel, and in a backward pass the helpers that it launches."""
    rates = target.rates
    if documents.context:  # decoding: keys and values of live positions
        rows, heads, _, width = hlo.shapes(types[one.operands[1]])[0][1]
        moved = 2 * 2 * rows * heads * documents.context * width
        return moved / (target.memory_bytes_per_s * rates.decode_bandwidth)
    backward = "fmhaSoftmaxBackward" in one.rest
    rows, length, heads, width = hlo.shapes(types[one.operands[0]])[0][1]
    work = 2 * heads * width * rows * (documents.squares + rates.attention_tokens * length)
    if not backward:
        return work / (target.bf16_flops_per_s * rates.attention_forward)
    segments = hlo.shapes(types[one.operands[3]])[0][1][0] // rows
    helpers = 2 * segments * rows * length * heads * width + 16 * rows * length * heads * width
    return 2.5 * work / (target.bf16_flops_per_s * rates.attention_backward) + helpers / target.memory_bytes_per_s
