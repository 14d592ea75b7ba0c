"""Names and transposes of our parameters in Hugging Face files, used by import and export alike.

Weights are [out, in] in Hugging Face files and stacked [L, in, out] here.
"""

from collections.abc import Iterator
from typing import Any

import jax

from jaxreason.model import ModelConfig, family_of, shapes

EMBEDDING, _NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
DTYPES = ("float32", "bfloat16")


def rows(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], bool, jax.ShapeDtypeStruct]]:
    """Every parameter of this architecture: (name there, path, transposed there?, shape of our leaf).

    {} in the name counts layers, which we stack on the first axis. Raises ValueError for a parameter without a name there.
    """
    specs = flatten(shapes(config))
    table = ((EMBEDDING, ("embedding",), False), *family_of(config).hf.table, (_NORM, ("norm", "scale"), False))
    for pattern, path, transposed in (*table, (HEAD, ("head",), False)):
        if path in specs:
            yield pattern, path, transposed, specs.pop(path)
    if specs:
        missing = ", ".join(".".join(path) for path in sorted(specs))
        raise ValueError(f"families: {config.arch.family} has parameters without a Hugging Face name: {missing}")


def flatten(tree: dict, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Leaves of nested dicts by path."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key): value}
    return leaves


def unflatten(leaves: dict[tuple[str, ...], Any]) -> dict:
    """The inverse of :func:`flatten`."""
    tree: dict = {}
    for (*parents, last), value in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
