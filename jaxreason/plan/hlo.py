"""What a compiled program does, read from its HLO text: collectives and their bytes, custom calls, array shapes."""

import collections
import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
          "s64": 8, "u64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.$-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_DEFINITION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.*?) [a-z][\w-]*\(", re.M)
_CALLED = re.compile(r"(body|condition|calls|to_apply)=%?([\w.$-]+)|(?:branch|called)_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    kind: str
    type: str  # of the result
    rest: str  # operands and attributes
    times: int  # how often one run of the program executes it


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


def instructions(text: str, loops: int = 1, fused: bool = False) -> list[Instruction]:
    """Every instruction that the program executes as such or, with ``fused``, also those inside fusions.

    ``loops`` is how often a loop runs whose number of rounds the compiler does not know.
    """
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry = name = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            bodies[name].append((found[1], found[2], found[3]))
    times: dict[str, int] = collections.Counter()
    if entry is not None:
        _count(entry, 1, bodies, times, loops, fused)
    return [
        Instruction(kind, type_text, rest, times[name])
        for name, body in bodies.items()
        if times[name]
        for type_text, kind, rest in body
    ]


def _count(name: str, count: int, bodies: dict, times: dict, loops: int, fused: bool) -> None:
    times[name] += count
    for _, kind, rest in bodies.get(name, ()):
        if kind == "fusion" and not fused:
            continue
        trips = _TRIPS.search(rest)
        rounds = (int(trips[1]) if trips else loops) if kind == "while" else 1
        for role, one, several in _CALLED.findall(rest):
            if role == "to_apply" and kind != "call":  # how two elements are combined, not a step of the program
                continue
            for called in [one] if one else re.findall(r"[\w.$-]+", several):
                _count(called, count * rounds, bodies, times, loops, fused)


def _found(pattern: str, text: str) -> str:
    """The pattern's group. Raises ValueError where an instruction is not written as this file expects."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"an instruction of the compiled program has no {pattern}: {text[:200]}")
    return match[1]


def matmul_flops(text: str, loops: int = 1) -> int:
    """FLOPs of all matrix products; attention's custom calls are not among them."""
    types = dict(_DEFINITION.findall(text))
    total = 0
    for one in instructions(text, loops, fused=True):
        if one.kind != "dot" and not (one.kind == "custom-call" and "__cublas" in one.rest):
            continue
        left = shapes(types[_found(r"^%?([\w.$-]+)", one.rest)])[0][1]
        contracted = _found(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', one.rest)
        depth = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))
        total += 2 * math.prod(shapes(one.type)[0][1]) * depth * one.times
    return total


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
