"""From rows to batches: ``pipeline.prepare`` for SFT, ``prompts.load_prompts`` for GRPO and evaluation."""

from jaxreason.data.schema import SCHEMAS, Example

__all__ = ["SCHEMAS", "Example"]
