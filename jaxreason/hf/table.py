"""The one table of names and transposes, used by import and export.

Weights are [out, in] in Hugging Face files and stacked [L, in, out] here.
"""

from collections.abc import Iterator
from typing import Any

import jax

from jaxreason.model import LlamaConfig, init

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = ("float32", "bfloat16")
_BLOCK = "model.layers.{}."
# (Hugging Face name, our path, transposed there?); {} counts layers, which we stack on the first axis.
TABLE: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    (EMBEDDING, ("embedding",), False),
    (_BLOCK + "input_layernorm.weight", ("layers", "attention_norm", "scale"), False),
    *(
        (f"{_BLOCK}self_attn.{name}_proj.{kind}", ("layers", "attention", name, leaf), leaf == "kernel")
        for name in "qkvo"
        for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
    ),
    (_BLOCK + "post_attention_layernorm.weight", ("layers", "mlp_norm", "scale"), False),
    *(
        (f"{_BLOCK}mlp.{name}_proj.{kind}", ("layers", "mlp", name, leaf), leaf == "kernel")
        for name in ("gate", "up", "down")
        for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
    ),
    ("model.norm.weight", ("norm", "scale"), False),
    (HEAD, ("head",), False),
)


def rows(config: LlamaConfig) -> Iterator[tuple[str, tuple[str, ...], bool, jax.ShapeDtypeStruct]]:
    """The rows of the table that this architecture has, with the shape of our leaf."""
    specs = flatten(jax.eval_shape(lambda: init(config, jax.random.key(0))))
    for pattern, path, transposed in TABLE:
        if path in specs:
            yield pattern, path, transposed, specs.pop(path)
    assert not specs, f"parameters without a Hugging Face name: {sorted(specs)}"


def flatten(tree: dict, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Leaves of nested dicts by path."""
    leaves = {}
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
