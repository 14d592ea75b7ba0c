"""What a compiled program does, read from its HLO text: collectives and their bytes, custom calls, array shapes."""

import collections
import dataclasses
import functools
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
          "s64": 8, "u64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(body|condition|calls|to_apply)=%?([\w.$-]+)|(?:branch|called)_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OPERAND = re.compile(r"%([\w.$-]+)")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    kind: str
    type: str  # of the result
    rest: str  # operands and attributes
    times: int = 1  # how often one run of the program executes it

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return _OPERAND.findall(self.rest[: self.rest.find(")")])

    def attribute(self, pattern: str) -> str | None:
        """The pattern's group, searched in what is written after the operands; None where it is not there."""
        found = re.search(pattern, self.rest)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    times: int
    bytes: int  # of the whole (gathered, or not yet scattered) array, of one execution

    @property
    def total_bytes(self) -> int:
        return self.times * self.bytes


def size(type_text: str) -> list[int]:
    """Bytes of every array in an HLO type."""
    return [_BYTES.get(kind, 0) * math.prod(dims) for kind, dims in shapes(type_text)]


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of every array type in ``text``, in order."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _SHAPE.findall(text)]


@functools.lru_cache(maxsize=2)  # a report asks a text of some megabytes six questions
def computations(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """Every computation's instructions by its name, the root as the last one; and the name of the program's own."""
    bodies: dict[str, list[Instruction]] = {}
    entry = name = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            kind, type_text = found[3], found[2]
            if kind == "fusion-start":  # of jax 0.12: ((operands), result, context), beside other work until its fusion-done
                kind, type_text = "fusion", _elements(type_text)[1]
            bodies[name].append(Instruction(found[1], kind, type_text, found[4]))
    return bodies, entry


def _elements(type_text: str) -> list[str]:
    """The types that a tuple's type holds."""
    found, depth = [""], 0
    for letter in type_text[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found]


def instructions(text: str, loops: int = 1, fused: bool = False, share: float = 1.0) -> list[Instruction]:
    """Every instruction that the program executes as such or, with ``fused``, also those inside fusions.

    Args:
      text: HLO.
      loops: rounds of a loop whose number of rounds the compiler does not know, where no other loop is around it.
      share: a document's part of its row. A loop without a known end inside one of n rounds is blockwise attention's: for the
        query block i of a document it runs over the i key blocks up to it, (n · share + 1) / 2 of them on average.
    """
    bodies, entry = computations(text)
    times: dict[str, int] = collections.Counter()

    def count(name: str, runs: int, around: int | None) -> None:
        """``around``: rounds of the loop that this computation is a part of; None: of none."""
        times[name] += runs
        for one in bodies.get(name, ()):
            if one.kind == "fusion" and not fused:
                continue
            rounds, inside = 1, around
            if one.kind == "while":
                trips = _TRIPS.search(one.rest)
                unknown = loops if around is None else math.ceil((around * share + 1) / 2)
                rounds = inside = int(trips[1]) if trips else unknown
            for role, called, several in _CALLED.findall(one.rest):
                if role == "to_apply" and one.kind != "call":  # how two elements are combined, not a step of the program
                    continue
                for name_of in [called] if called else re.findall(r"[\w.$-]+", several):
                    count(name_of, runs * rounds, inside)

    if entry is not None:
        count(entry, 1, None)
    return [dataclasses.replace(one, times=times[name]) for name, body in bodies.items() if times[name] for one in body]


def is_product(one: Instruction) -> bool:
    """Whether it is a matrix product: XLA's own, or a call of cuBLAS."""
    return one.kind == "dot" or (one.kind == "custom-call" and "__cublas" in one.rest)


def product_shape(one: Instruction, types: dict[str, str]) -> tuple[int, int, int, int]:
    """(B, M, N, K) of a product of B times [M, K] and [K, N].

    Raises ValueError where it is not written as this file expects.
    """
    left = shapes(types[one.operands[0]])[0][1]
    axes = {}
    for word in ("contracting", "batch"):
        found = one.attribute(rf'lhs_{word}_dim(?:ension)?s"?[=:][{{\[]([^}}\]]*)')
        if found is None and word == "contracting":
            raise ValueError(f"a matrix product of the compiled program has no contracting dimensions: {one.rest[:200]}")
        axes[word] = math.prod(left[int(axis)] for axis in re.findall(r"\d+", found or ""))
    depth, batch = axes["contracting"], axes["batch"]
    rows = math.prod(left) // (depth * batch)
    return batch, rows, math.prod(shapes(one.type)[0][1]) // (batch * rows), depth


def matmul_flops(text: str, loops: int = 1, share: float = 1.0) -> int:
    """FLOPs of all matrix products; attention's custom calls are not among them. Arguments as of ``instructions``."""
    bodies, _ = computations(text)
    types = {one.name: one.type for body in bodies.values() for one in body}
    products = (one for one in instructions(text, loops, fused=True, share=share) if is_product(one))
    return sum(2 * math.prod(product_shape(one, types)) * one.times for one in products)


def collectives(text: str, loops: int = 1) -> list[Collective]:
    """Collectives in order of their total bytes, alike ones together."""
    found: dict[tuple[str, int], int] = collections.Counter()
    for one in instructions(text, loops):
        kind = one.kind.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        sizes = size(one.type)
        # An asynchronous start returns its operands and its results; the larger of both is the whole array.
        half = len(sizes) // 2
        whole = max(sum(sizes[:half]), sum(sizes[half:])) if one.kind != kind and len(sizes) > 1 else sum(sizes)
        found[kind, whole] += one.times
    made = [Collective(kind, times, whole) for (kind, whole), times in found.items()]
    return sorted(made, key=lambda c: -c.total_bytes)


def custom_calls(text: str, loops: int = 1) -> dict[str, int]:
    """Custom-call target → how often one run of the program calls it."""
    found: dict[str, int] = collections.Counter()
    for one in instructions(text, loops):
        if one.kind == "custom-call" and (target := re.search(r'custom_call_target="([^"]+)"', one.rest)):
            found[target[1]] += one.times
    return dict(found)
