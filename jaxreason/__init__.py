"""jaxreason: SFT and GRPO for Llama models that reason, in pure-functional JAX."""

__version__ = "0.1.0"
