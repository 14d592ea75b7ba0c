"""The blocks that the families share: norm, dense, attention with rotary positions, gated mlp, and one decoder layer.

Parameters of a layer, stacked over layers for training:

    {attention_norm,mlp_norm}.scale [L, D] · attention.{q,k,v,o}.kernel [L, in, out] · mlp.{gate,up,down}.kernel [L, in, out]
    where the family has them: .bias [L, out] of each Dense · attention.{q_norm,k_norm}.scale [L, H]
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxreason.errors import present
from jaxreason.model import quantized
from jaxreason.model.attention import attention, cached_attention
from jaxreason.model.config import ModelConfig
from jaxreason.model.lora import adapted
from jaxreason.model.product import times_transposed
from jaxreason.model.rope import rotate

Tables = tuple[Array, Array]
Cache = tuple[Array, Array]

# Denses that multiply the same input, by the module that has them: decoding stores each group as one.
FUSED = {"attention": (("q", "k", "v"), ("o",)), "mlp": (("gate", "up"), ("down",))}

_LAYER = "model.layers.{}."
# Hugging Face's names of these parameters: (name, our path, transposed there?); {} counts layers.
HF_TABLE: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    (_LAYER + "input_layernorm.weight", ("layers", "attention_norm", "scale"), False),
    *(
        (f"{_LAYER}self_attn.{name}_proj.{kind}", ("layers", "attention", name, leaf), leaf == "kernel")
        for name in "qkvo"
        for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
    ),
    (_LAYER + "post_attention_layernorm.weight", ("layers", "mlp_norm", "scale"), False),
    *(
        (f"{_LAYER}mlp.{name}_proj.{kind}", ("layers", "mlp", name, leaf), leaf == "kernel")
        for name in ("gate", "up", "down")
        for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
    ),
)
# Keys of config.json that ask these blocks for what they do not compute, unless they have the value given here.
HF_FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "only silu is implemented"),
    "attention_dropout": (0.0, "dropout is not implemented: set it to 0.0"),
    "partial_rotary_factor": (1.0, "only rotary embeddings over the whole head are implemented"),
    "rope_interleaved": (False, "only half-split rotary pairs are implemented"),
    "quantization_config": (None, "give the unquantized checkpoint"),
    "auto_map": (None, "the checkpoint brings its own model code, which is never run; give one without it"),
    "use_sliding_window": (False, "only full causal attention is implemented"),
    "add_cross_attention": (False, "cross attention is not implemented"),
}


class Norm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale (arXiv 1910.07467), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.execution.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.arch.norm_eps)
        # transformers rounds before it scales; in bfloat16 the order shows.
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class Dense(nn.Module):
    """x [rows, in] · kernel [in, out] (+ bias); ``unstack`` stores the kernel as ``transposed`` [out, in].

    Where the parameters hold an adapter of it, its part is added (``model/lora.py``); beside one the kernel may be quantized
    (``model/quantized.py``).
    """

    features: int
    use_bias: bool
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.config.execution.param_dtype
        if self.has_variable("params", "transposed"):
            out = times_transposed(x, self.get_variable("params", "transposed"))
        else:
            stored: Any = self.get_variable("params", "kernel")
            if isinstance(stored, Mapping):
                out = quantized.product(x, stored, self.config.execution.scan_layers)
            else:
                drawn = nn.initializers.normal(self.config.arch.init_std)
                kernel = self.param("kernel", drawn, (x.shape[-1], self.features), dtype)
                out = x @ kernel.astype(x.dtype)
            if self.has_variable("params", "lora_a") or self.has_variable("params", "start_a"):
                out = adapted(out, x, self.variables["params"], present(self.config.adapter, "ModelConfig.adapter"))
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, (self.features,), dtype).astype(x.dtype)
        return out


def _denses(parent: nn.Module, x: Array, sizes: dict[str, int], use_bias: bool, config: ModelConfig) -> list[Array]:
    """One Dense of x a name; for decoding ``unstack`` fused them into one, whose outputs are split."""
    fused = "_".join(sizes)
    if parent.has_variable("params", fused):
        out = Dense(sum(sizes.values()), use_bias, config, name=fused)(x)
        return jnp.split(out, np.cumsum([*sizes.values()])[:-1], axis=-1)
    return [Dense(size, use_bias, config, name=name)(x) for name, size in sizes.items()]


class Attention(nn.Module):
    """Causal attention with grouped queries; ``qk_norm`` normalises each head of q and k before the rotation."""

    config: ModelConfig
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        batch: tuple[int, int],
        tables: Tables,
        segment_ids: Array | None,
        cache: Cache | None,
        write: Callable | None,
        visible: Array | None,
    ) -> tuple[Array, Any]:
        c, run = self.config.arch, self.config.execution
        sizes = {"q": c.num_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}
        q, k, v = (y.reshape(*batch, -1, c.head_dim) for y in _denses(self, x, sizes, self.qkv_bias, self.config))
        if self.qk_norm:
            # The norm's backward reads its input, so that is what is kept: norm and rotation are cheap to compute again.
            q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
            q, k = Norm(self.config, name="q_norm")(q), Norm(self.config, name="k_norm")(k)
            q, k, v = rotate(q, tables), rotate(k, tables), checkpoint_name(v, "value")
        else:
            q = checkpoint_name(rotate(q, tables), "query")
            k, v = checkpoint_name(rotate(k, tables), "key"), checkpoint_name(v, "value")
        if write is not None:
            cache = write(cache, k, v)
        if visible is None:
            assert segment_ids is not None  # rows that attend to themselves have segments
            out = attention(q, k, v, segment_ids, run.attention, run.max_segments)
        else:
            assert cache is not None  # what is visible is visible in it
            out = cached_attention(q, *cache, visible, run.attention)
        out = out.reshape(-1, c.num_heads * c.head_dim)
        return checkpoint_name(Dense(c.embed_dim, self.output_bias, self.config, name="o")(out), "projection"), cache


class Mlp(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    config: ModelConfig
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config.arch
        gate, up = _denses(self, x, {"gate": c.mlp_dim, "up": c.mlp_dim}, self.use_bias, self.config)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        down = Dense(c.embed_dim, self.use_bias, self.config, name="down")(nn.silu(gate) * up)
        return checkpoint_name(down, "down")


class Block(nn.Module):
    """One layer. x is [B·T, D]: XLA's CPU backward of a 2-D matmul is about twice as fast as that of a 3-D one."""

    config: ModelConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        batch: tuple[int, int],
        tables: Tables,
        segment_ids: Array | None,
        cache: Cache | None = None,
        write: Callable | None = None,
        visible: Array | None = None,
    ) -> tuple[Array, Any]:
        """x after the layer, and what ``write`` made of the cache and this layer's keys and values [B, T, K, H].

        Args:
          batch: B and T.
          tables: of :func:`jaxreason.model.rope.rope_tables`.
          segment_ids: [B, T] of packed rows that attend to themselves; ignored where ``visible`` is given.
          visible: [B, T, C] bool, which entries of the cache each token attends to.
        """
        c = self.config
        attend = Attention(c, self.qkv_bias, self.output_bias, self.qk_norm, name="attention")
        mixed, cache = attend(Norm(c, name="attention_norm")(x), batch, tables, segment_ids, cache, write, visible)
        x = x + mixed
        return x + Mlp(c, self.mlp_bias, name="mlp")(Norm(c, name="mlp_norm")(x)), cache
