"""Llama as a Linen module: params are a plain dict, ``apply`` is a pure function.

Parameters (stacked over layers for training; :func:`unstack` makes per-layer dicts for decoding):

    embedding [V, D] · layers.{attention_norm,mlp_norm}.scale [L, D] · layers.attention.{q,k,v,o}.kernel [L, in, out]
    layers.mlp.{gate,up,down}.kernel [L, in, out] · norm.scale [D] · head [V, D] (untied only)
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxreason.model.attention import attention, cached_attention, resolve
from jaxreason.model.config import LlamaConfig
from jaxreason.model.cudnn import refuse_overfull
from jaxreason.model.placement import pin_rows
from jaxreason.model.product import times_transposed
from jaxreason.model.rope import rope_tables, rotate

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "matmuls": jax.checkpoint_policies.save_only_these_names(
        "attention_out", "attention_lse", "query", "key", "value", "projection", "gate", "up", "down"
    ),
}


class Norm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale (arXiv 1910.07467), computed in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.norm_eps)
        # Llama rounds before it scales; in bfloat16 the order shows.
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class Dense(nn.Module):
    """x [rows, in] · kernel [in, out] (+ bias); ``unstack`` stores the kernel as ``transposed`` [out, in]."""

    features: int
    use_bias: bool
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        if self.has_variable("params", "transposed"):
            out = times_transposed(x, self.get_variable("params", "transposed"))
        else:
            shape = (x.shape[-1], self.features)
            out = x @ self.param("kernel", nn.initializers.normal(c.init_std), shape, c.param_dtype).astype(x.dtype)
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, (self.features,), c.param_dtype).astype(x.dtype)
        return out


def _denses(parent: nn.Module, x: Array, sizes: dict[str, int], use_bias: bool, config: LlamaConfig) -> list[Array]:
    """One Dense of x a name; for decoding ``unstack`` fused them into one, whose outputs are split."""
    fused = "_".join(sizes)
    if parent.has_variable("params", fused):
        out = Dense(sum(sizes.values()), use_bias, config, name=fused)(x)
        return jnp.split(out, np.cumsum([*sizes.values()])[:-1], axis=-1)
    return [Dense(size, use_bias, config, name=name)(x) for name, size in sizes.items()]


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, batch: tuple[int, int], tables, segment_ids, cache, write, visible):
        c = self.config
        sizes = {"q": c.num_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}
        q, k, v = (y.reshape(*batch, -1, c.head_dim) for y in _denses(self, x, sizes, c.attention_bias, c))
        q = checkpoint_name(rotate(q, tables), "query")
        k, v = checkpoint_name(rotate(k, tables), "key"), checkpoint_name(v, "value")
        if write is not None:
            cache = write(cache, k, v)
        if visible is None:
            out = attention(q, k, v, segment_ids, c.attention, c.max_segments)
        else:
            out = cached_attention(q, *cache, visible, c.attention)
        out = out.reshape(-1, c.num_heads * c.head_dim)
        return checkpoint_name(Dense(c.embed_dim, c.attention_bias, c, name="o")(out), "projection"), cache


class Mlp(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate, up = _denses(self, x, {"gate": c.mlp_dim, "up": c.mlp_dim}, c.mlp_bias, c)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return checkpoint_name(Dense(c.embed_dim, c.mlp_bias, c, name="down")(nn.silu(gate) * up), "down")


class Layer(nn.Module):
    """One block. x is [B·T, D]: XLA's CPU backward of a 2-D matmul is about twice as fast as that of a 3-D one."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, batch, tables, segment_ids, cache=None, write=None, visible=None):
        c = self.config
        mixed, cache = Attention(c, name="attention")(
            Norm(c, name="attention_norm")(x), batch, tables, segment_ids, cache, write, visible
        )
        x = x + mixed
        return x + Mlp(c, name="mlp")(Norm(c, name="mlp_norm")(x)), cache


class Llama(nn.Module):
    """Tokens to final normed hidden states; the vocabulary head is ``model/vocab.py``."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: Array, positions: Array, segment_ids: Array, noise: Array | None = None) -> Array:
        """Hidden states [B, T, D] in the compute dtype, of tokens, positions, segment_ids [B, T].

        ``noise`` [B, T, D] is added to the embeddings (NEFTune).
        """
        c = self.config
        table = self.param("embedding", nn.initializers.normal(c.init_std), (c.vocab_size, c.embed_dim), c.param_dtype)
        if not c.tie_embeddings:
            self.param("head", nn.initializers.normal(c.init_std), (c.vocab_size, c.embed_dim), c.param_dtype)
        x = jnp.take(table, tokens, axis=0).astype(c.compute_dtype)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        if resolve(c.attention, x.dtype, c.head_dim) == "cudnn":
            x = refuse_overfull(x, segment_ids, c.max_segments)
        batch, tables = tokens.shape, rope_tables(positions, c)

        def body(layer: Layer, carry: Array):
            x, cache = layer(carry, batch, tables, segment_ids)
            return pin_rows(x, batch[0]), cache

        if c.remat != "none":
            body = nn.remat(body, policy=_POLICIES[c.remat], prevent_cse=False)
        x = pin_rows(x.reshape(-1, c.embed_dim), batch[0])
        if isinstance(self.variables.get("params", {}).get("layers"), list):
            x = self._unrolled(x, batch, tables, segment_ids)
        else:
            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
            x, _ = scan(Layer(c, name="layers"), x)
        return Norm(c, name="norm")(x).reshape(*batch, c.embed_dim)

    def _unrolled(self, x: Array, batch: tuple[int, int], tables: tuple[Array, Array], segment_ids: Array) -> Array:
        """x [B·T, D] after all layers, whose parameters are a list with one dict a layer."""
        c = self.config

        def one(weights: dict, x: Array) -> Array:
            x, _ = Layer(c, parent=None).apply({"params": weights}, x, batch, tables, segment_ids)
            return pin_rows(x, batch[0])

        if c.remat != "none":
            # What ``matmuls`` leaves to compute again is so little that the compiler may keep it where that is faster.
            one = jax.checkpoint(one, policy=_POLICIES[c.remat], prevent_cse=c.remat != "matmuls")
        for weights in self.variables["params"]["layers"]:
            x = one(weights, x)
        return x


def init(config: LlamaConfig, key: Array) -> dict:
    """Random parameters: normal(init_std) kernels and embeddings, unit norms, zero biases."""
    dummy = jnp.zeros((1, 1), jnp.int32)
    return Llama(config).init(key, dummy, dummy, dummy)["params"]


def hidden(params: dict, config: LlamaConfig, tokens, positions=None, segment_ids=None, noise=None) -> Array:
    """Final hidden states [B, T, D]; positions default to 0…T−1, segments to one a row."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    return Llama(config).apply({"params": params}, tokens, positions, segment_ids, noise)


def head_kernel(params: dict, config: LlamaConfig) -> Array:
    """The output table [V, D]: the embedding where tied."""
    return params["embedding"] if config.tie_embeddings else params["head"]


def logits(params: dict, config: LlamaConfig, tokens, positions=None, segment_ids=None) -> Array:
    """Full logits [B, T, V] float32. For tests and small inputs; training never forms this array."""
    x = hidden(params, config, tokens, positions, segment_ids)
    head = head_kernel(params, config).astype(x.dtype)
    return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)


def cast_layers(params: dict, config: LlamaConfig) -> dict:
    """The same parameters with the layers' in the compute dtype, once for all microbatches; ``layers`` may become a list.

    It does where ``config.scan_layers`` is false: one dict a layer, as :meth:`Llama._unrolled` takes them. The tables
    stay as they are: gradients of an embedding add up in the dtype of the table.
    """

    def cast(w: Array) -> Array:
        return w.astype(config.compute_dtype)

    if config.scan_layers:
        return {**params, "layers": jax.tree.map(cast, params["layers"])}
    layers = [jax.tree.map(lambda w, i=i: cast(w[i]), params["layers"]) for i in range(config.num_layers)]
    return {**params, "layers": layers}


def add_gradients(total: dict, grads: dict) -> dict:
    """``total`` [stacked over layers, float32] plus ``grads`` with respect to what :func:`cast_layers` returned."""

    def add(a: Array, g: Array) -> Array:
        return a + g.astype(a.dtype)

    if not isinstance(grads["layers"], list):
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


def unstack(params: dict, config: LlamaConfig) -> dict:
    """The same parameters in the compute dtype for decoding: ``layers`` a list with one dict a layer.

    Kernels that multiply the same input are fused (``q_k_v``, ``gate_up``) and stored [out, in]: see ``product.py``.
    """
    cast = jax.tree.map(lambda w: w.astype(config.compute_dtype), params)

    def fuse(denses: dict, *names: str) -> dict:
        """The Denses of ``names`` as one; their leaves are kernel [in, out] and bias [out]."""
        fused = {"transposed": jnp.concatenate([denses[name]["kernel"].T for name in names])}
        if "bias" in denses[names[0]]:
            fused["bias"] = jnp.concatenate([denses[name]["bias"] for name in names])
        return {"_".join(names): fused}

    layers = []
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda w, i=i: w[i], cast["layers"])
        attention_, mlp = layer["attention"], layer["mlp"]
        layers.append(
            {
                **layer,
                "attention": fuse(attention_, "q", "k", "v") | fuse(attention_, "o"),
                "mlp": fuse(mlp, "gate", "up") | fuse(mlp, "down"),
            }
        )
    return {**cast, "layers": layers}


def next_logits(params: dict, config: LlamaConfig, x: Array) -> Array:
    """Logits [B, V] float32 of final hidden states x [B, D]; ``params`` from :func:`unstack`."""
    return times_transposed(x, head_kernel(params, config), jnp.float32)


def prefill(params: dict, config: LlamaConfig, tokens: Array, segment_ids: Array) -> list[tuple[Array, Array]]:
    """Per layer the (k, v), each [B, K, T, H], of rows that start at position 0; ``params`` from :func:`unstack`.

    It attends as training does, in memory linear in T, and forms no logits.
    """
    x = jnp.take(params["embedding"], tokens, axis=0).astype(config.compute_dtype).reshape(-1, config.embed_dim)
    tables = rope_tables(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), config)

    def keep(_, k, v):
        return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    entries = []
    for layer in params["layers"]:
        x, entry = Layer(config).apply({"params": layer}, x, tokens.shape, tables, segment_ids, None, keep)
        entries.append(entry)
    return entries


def step_cached(params: dict, config: LlamaConfig, tokens, positions, caches: list, write, visible):
    """Hidden states [B, S, D] of S new tokens, and the caches that now hold them.

    Args:
      params: from :func:`unstack`.
      caches: per layer a (k, v) pair, each [B, K, C, H].
      write: ``(cache, k, v) -> cache`` puts k, v [B, S, K, H] of the new tokens in place.
      visible: [B, S, C] bool, which cache entries each new token attends to, itself included.
    """
    x = jnp.take(params["embedding"], tokens, axis=0).astype(config.compute_dtype).reshape(-1, config.embed_dim)
    tables, new = rope_tables(positions, config), []
    for layer, cache in zip(params["layers"], caches):
        x, cache = Layer(config).apply({"params": layer}, x, tokens.shape, tables, None, cache, write, visible)
        new.append(cache)
    x = Norm(config).apply({"params": params["norm"]}, x)
    return x.reshape(*tokens.shape, config.embed_dim), new
