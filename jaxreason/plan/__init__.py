"""Planning: the real step compiled for GPUs that are not here, its exact memory, and what it will cost."""

from jaxreason.plan.options import Options
from jaxreason.plan.run import plan

__all__ = ["Options", "plan"]
