"""A decoder of any family as a Linen module: params are a plain dict, ``apply`` is a pure function.

Parameters (stacked over layers for training; :func:`unstack` makes per-layer dicts for decoding):

    embedding [V, D] · layers: one of the family's layers, each leaf [L, …] · norm.scale [D] · head [V, D] (untied only)
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from jaxreason.errors import UserError, present
from jaxreason.model import lora, quantized
from jaxreason.model.attention import resolve
from jaxreason.model.blocks import Norm
from jaxreason.model.config import Architecture, Execution, ModelConfig
from jaxreason.model.cudnn import refuse_overfull
from jaxreason.model.families import family_of
from jaxreason.model.placement import pin_rows
from jaxreason.model.product import times_transposed
from jaxreason.model.rope import rope_tables
from jaxreason.types import merge

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "matmuls": jax.checkpoint_policies.save_only_these_names(
        "attention_out", "attention_lse", "query", "key", "value", "projection", "gate", "up", "down"
    ),
}


class Decoder(nn.Module):
    """Tokens to final normed hidden states; the vocabulary head is ``model/vocab.py``."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Array, positions: Array, segment_ids: Array, noise: Array | None = None) -> Array:
        """Hidden states [B, T, D] in the compute dtype, of tokens, positions, segment_ids [B, T].

        Where the head has an adapter they are [B, T, D + r], see :func:`head_kernel`. ``noise`` [B, T, D] is added to the
        embeddings (NEFTune).
        """
        c, run = self.config.arch, self.config.execution
        drawn, shape = nn.initializers.normal(c.init_std), (c.vocab_size, c.embed_dim)
        table = self.param("embedding", drawn, shape, run.param_dtype)
        if not c.tie_embeddings:
            self.param("head", drawn, shape, run.param_dtype)
        x = jnp.take(table, tokens, axis=0).astype(run.compute_dtype)
        if leaves := self._table_adapter("embedding"):
            rows = jnp.take(leaves["lora_b"], tokens, axis=0).astype(x.dtype)
            x = x + rows @ leaves["lora_a"].astype(x.dtype) * present(self.config.adapter, "ModelConfig.adapter").scale
        if noise is not None:
            x = x + noise.astype(x.dtype)
        if resolve(run.attention, x.dtype, c.head_dim) == "cudnn":
            x = refuse_overfull(x, segment_ids, run.max_segments)
        batch, tables = tokens.shape, rope_tables(positions, c)

        def body(layer: nn.Module, carry: Array) -> tuple[Array, None]:
            x, cache = layer(carry, batch, tables, segment_ids)
            return pin_rows(x, batch[0]), cache

        if run.remat != "none":
            body = nn.remat(body, policy=_POLICIES[run.remat], prevent_cse=False)
        x = pin_rows(x.reshape(-1, c.embed_dim), batch[0])
        if isinstance(self.variables.get("params", {}).get("layers"), list):
            x = self._unrolled(x, batch, tables, segment_ids)
        else:
            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
            x, _ = scan(family_of(self.config).layer(self.config, "layers"), x)
        x = Norm(self.config, name="norm")(x).reshape(*batch, c.embed_dim)
        if leaves := self._table_adapter(_head_name(self.config)):
            thin = x @ leaves["lora_a"].astype(x.dtype).T * present(self.config.adapter, "ModelConfig.adapter").scale
            x = jnp.concatenate([x, thin], axis=-1)
        return x

    def _table_adapter(self, table: str) -> Mapping[str, Array]:
        return self.variables.get("params", {}).get(lora.TABLES[table], {})

    def _unrolled(self, x: Array, batch: tuple[int, ...], tables: tuple[Array, Array], segment_ids: Array) -> Array:
        """x [B·T, D] after all layers, whose parameters are a list with one dict a layer."""
        remat = self.config.execution.remat
        layer = family_of(self.config).layer(self.config, None).clone(parent=None)

        def one(weights: dict, x: Array) -> Array:
            x, _ = _apply(layer, weights, x, batch, tables, segment_ids)
            return pin_rows(x, batch[0])

        if remat != "none":
            # What ``matmuls`` leaves to compute again is so little that the compiler may keep it where that is faster.
            one = jax.checkpoint(one, policy=_POLICIES[remat], prevent_cse=remat != "matmuls")
        for weights in self.variables["params"]["layers"]:
            x = one(weights, x)
        return x


def init(config: ModelConfig, key: Array) -> dict:
    """Random parameters: normal(init_std) kernels and embeddings, unit norms, zero biases."""
    dummy = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, dummy, dummy, dummy)["params"]


def shapes(config: ModelConfig) -> dict:
    """Shape and dtype of every parameter, as ``jax.ShapeDtypeStruct``; nothing is allocated."""
    leaves, tree = _shapes(config.arch, config.execution.param_dtype)
    return jax.tree.unflatten(tree, leaves)


def full_shapes(config: ModelConfig) -> dict:
    """:func:`shapes`, with the adapters' in place where the config has them, and the base as it is kept beside them."""
    own = shapes(config)
    if config.adapter is None:
        return own
    return merge(jax.eval_shape(lambda p: frozen_base(p, config), own), lora.shapes(own, config.adapter))


def frozen_base(params: dict, config: ModelConfig) -> dict:
    """The model's own parameters as the config's adapters keep them beside themselves: of PiSSA what is left of a kernel, with
    its start, and all kernels quantized where they are. Raises UserError."""
    adapter = config.adapter
    if adapter is None:
        return params
    if adapter.init == "pissa":
        params = lora.without_principal(params, adapter)
    if adapter.base == "param":
        return params
    quantized.check(params, adapter.base)
    return quantized.map_kernels(lambda kernel: quantized.quantize(kernel, adapter.base), params)


def init_adapters(config: ModelConfig, key: Array) -> dict:
    """The parameters of the config's adapters that need no weights: A drawn, B zero (:func:`jaxreason.model.lora.init`)."""
    return lora.init(shapes(config), present(config.adapter, "ModelConfig.adapter"), key)


@functools.lru_cache(maxsize=64)
def _shapes(arch: Architecture, dtype: str) -> tuple[list, jax.tree_util.PyTreeDef]:
    config = ModelConfig(arch, Execution(param_dtype=dtype, attention="reference"))
    return jax.tree.flatten(jax.eval_shape(lambda: init(config, jax.random.key(0))))


def param_count(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config)))


def hidden(
    params: dict,
    config: ModelConfig,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    noise: Array | None = None,
) -> Array:
    """Final hidden states [B, T, D], or [B, T, D + r] where the head has an adapter (:func:`head_kernel`).

    Positions default to 0…T−1, segments to one a row.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    return _apply(Decoder(config), params, tokens, positions, segment_ids, noise)


def _apply(module: nn.Module, params: dict, *arguments: Any) -> Any:
    """The module's results alone: by its types, flax may also return variables that changed, and here none can."""
    return module.apply({"params": params}, *arguments)


def _head_name(config: ModelConfig) -> str:
    return "embedding" if config.arch.tie_embeddings else "head"


def head_kernel(params: dict, config: ModelConfig) -> Array:
    """The output table [V, D]: the embedding where tied.

    With an adapter it is [W, B] [V, D + r] in the compute dtype, and :func:`hidden` gives [x, s·x·Aᵀ], so that their product is
    x·(W + s·B·A)ᵀ, unrounded, wherever logits are made in chunks.
    """
    table = params[_head_name(config)]
    leaves = params.get(lora.TABLES[_head_name(config)])
    if leaves is None:
        return table
    return jnp.concatenate([part.astype(config.execution.compute_dtype) for part in (table, leaves["lora_b"])], axis=1)


def logits(
    params: dict, config: ModelConfig, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None
) -> Array:
    """Full logits [B, T, V] float32. For tests and small inputs; training never forms this array."""
    x = hidden(params, config, tokens, positions, segment_ids)
    head = head_kernel(params, config).astype(x.dtype)
    return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)


def cast_layers(params: dict, config: ModelConfig) -> dict:
    """The same parameters with the layers' in the compute dtype, once for all microbatches; ``layers`` may become a list.

    It does where ``scan_layers`` is false: one dict a layer, as :class:`Decoder` takes them, too. The tables stay as they
    are: gradients of an embedding add up in the dtype of the table. A part of the parameters, without layers, is as it was.
    """
    if "layers" not in params:
        return params

    def cast(w: Array) -> Array:
        return w.astype(config.execution.compute_dtype)

    if config.execution.scan_layers:
        return {**params, "layers": quantized.map_plain(cast, params["layers"])}
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(config.arch.num_layers)]
    return {**params, "layers": [quantized.map_plain(cast, layer) for layer in layers]}


def add_gradients(total: dict, grads: dict) -> dict:
    """``total`` [stacked over layers, float32] plus ``grads`` with respect to what :func:`cast_layers` returned."""

    def add(a: Array, g: Array) -> Array:
        return a + g.astype(a.dtype)

    if not isinstance(grads.get("layers"), list):
        return jax.tree.map(add, total, grads)
    total, grads = dict(total), dict(grads)
    stack, layers = total.pop("layers"), grads.pop("layers")
    # The last layer's gradient is known first, and gone once it is added.
    for number, layer in reversed([*enumerate(layers)]):
        # XLA adds in place where it does not know the place; where it does, it copies the whole stack.
        place = lax.optimization_barrier(jnp.int32(number))
        stack = jax.tree.map(
            lambda a, g, place=place: a.at[place].add(
                g.astype(a.dtype), unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
            ),
            stack,
            layer,
        )
    return {**jax.tree.map(add, total, grads), "layers": stack}


def unstack(params: dict, config: ModelConfig) -> dict:
    """The same parameters in the compute dtype for decoding: ``layers`` a list with one dict a layer, adapters merged.

    Kernels that multiply the same input are fused (``q_k_v``, ``gate_up``: the family's ``fused``) and stored [out, in],
    see ``product.py``; every other parameter stays where it is, so that none can be lost.

    Raises: UserError naming a parameter that the architecture does not have, or lacks, or that fusing would lose.
    """
    found, wanted = (
        {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)}
        for tree in (params, full_shapes(config))
    )
    for name in sorted(found ^ wanted):
        state = "unknown to" if name in found else "missing for"
        raise UserError(f"parameter {name} is {state} the architecture {config.arch.family}: decoding would be another model")
    def cast(w: Array) -> Array:
        return w.astype(config.execution.compute_dtype)

    fused = family_of(config).fused

    def one(i: int) -> dict:
        layer = lora.merged(jax.tree.map(lambda w: w[i], params["layers"]), config.adapter)
        layer = jax.tree.map(cast, layer)
        return {name: _fuse(child, fused[name]) if name in fused else child for name, child in layer.items()}

    rest = lora.merged({name: child for name, child in params.items() if name != "layers"}, config.adapter)
    return {**jax.tree.map(cast, rest), "layers": [one(i) for i in range(config.arch.num_layers)]}


def _fuse(module: dict, groups: tuple[tuple[str, ...], ...]) -> dict:
    """A module's parameters with each group of Denses as one; kernel [in, out] and bias [out] are all that a Dense has."""
    out = {name: child for name, child in module.items() if not any(name in group for group in groups)}
    for names in groups:
        leaves = {leaf for name in names for leaf in module[name]}
        for name in names:
            if set(module[name]) != leaves or leaves - {"bias"} != {"kernel"}:
                raise UserError(
                    f"{name} has {', '.join(sorted(module[name]))}: decoding fuses {', '.join(names)}, which have a kernel "
                    "each, and all or none a bias; leave them out of the family's `fused` or merge the others first"
                )
        fused = {"transposed": jnp.concatenate([module[name]["kernel"].T for name in names])}
        if "bias" in leaves:
            fused["bias"] = jnp.concatenate([module[name]["bias"] for name in names])
        out["_".join(names)] = fused
    return out


def next_logits(params: dict, config: ModelConfig, x: Array) -> Array:
    """Logits [B, V] float32 of final hidden states x [B, D]; ``params`` from :func:`unstack`."""
    return times_transposed(x, head_kernel(params, config), jnp.float32)


def prefill(params: dict, config: ModelConfig, tokens: Array, segment_ids: Array) -> list[tuple[Array, Array]]:
    """Per layer the (k, v), each [B, K, T, H], of rows that start at position 0; ``params`` from :func:`unstack`.

    It attends as training does, in memory linear in T, and forms no logits.
    """
    x, layer = _embed(params, config, tokens), family_of(config).layer(config, None)
    tables = rope_tables(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), config.arch)

    def keep(_: None, k: Array, v: Array) -> tuple[Array, Array]:
        return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    entries = []
    for weights in params["layers"]:
        x, entry = _apply(layer, weights, x, tokens.shape, tables, segment_ids, None, keep)
        entries.append(entry)
    return entries


def step_cached(
    params: dict, config: ModelConfig, tokens: Array, positions: Array, caches: list, write: Callable, visible: Array
) -> tuple[Array, list]:
    """Hidden states [B, S, D] of S new tokens, and the caches that now hold them.

    Args:
      params: from :func:`unstack`.
      caches: per layer a (k, v) pair, each [B, K, C, H].
      write: ``(cache, k, v) -> cache`` puts k, v [B, S, K, H] of the new tokens in place.
      visible: [B, S, C] bool, which cache entries each new token attends to, itself included.
    """
    x, layer = _embed(params, config, tokens), family_of(config).layer(config, None)
    tables, new = rope_tables(positions, config.arch), []
    for weights, cache in zip(params["layers"], caches):
        x, cache = _apply(layer, weights, x, tokens.shape, tables, None, cache, write, visible)
        new.append(cache)
    x = _apply(Norm(config), params["norm"], x)
    return x.reshape(*tokens.shape, config.arch.embed_dim), new


def _embed(params: dict, config: ModelConfig, tokens: Array) -> Array:
    """Embeddings [B·T, D] in the compute dtype."""
    x = jnp.take(params["embedding"], tokens, axis=0).astype(config.execution.compute_dtype)
    return x.reshape(-1, config.arch.embed_dim)
