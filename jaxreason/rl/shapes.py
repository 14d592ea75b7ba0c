"""The shapes that a GRPO config leads to: one computation for training, planning and comparing."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.losses import Loss
from jaxreason.sharding import check_batch, microbatch_sizes
from jaxreason.train.setup import abstract_batch
from jaxreason.types import Batch

_ROWS = 32  # of a microbatch, where the config names no number
_ROWS_OF = "rollout.prompts_per_step x rollout.group_size x turns / train.minibatches"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of one update, over all processes. Every sequence may need a row of its own, so there are as many rows as sequences."""

    rows: int
    microbatch: int  # rows in one forward and backward pass
    row_length: int  # tokens, of packed sequences
    minibatches: int  # parts that a rollout is split into
    longest_prompt: int  # tokens, of either turn
    fields: tuple[str, ...]  # optional float fields of the batch
    extras: tuple[str, ...]  # inputs that a loss of one's own reads by name
    viewed: bool  # whether a teacher reads prompts of its own

    @property
    def microbatches(self) -> int:
        return self.rows // self.microbatch

    def batch(self, mesh: Mesh) -> Batch[jax.ShapeDtypeStruct]:
        """The batch as shapes."""
        return abstract_batch(self.rows, self.row_length, mesh, self.fields, self.extras, grouped=True, viewed=self.viewed)


def shapes_of(
    config: cfg.GrpoConfig,
    loss: Loss,
    longest_prompt: int,
    mesh: Mesh | AbstractMesh,
    processes: int = 1,
    context_tokens: int = 0,
) -> Shapes:
    """The shapes of ``config``, whose longest prompt of either turn has ``longest_prompt`` tokens, and a teacher's at most
    ``context_tokens`` more.

    Raises UserError where rows, microbatches, devices and processes do not divide, and for a ``teacher.data_fraction`` that is
    no prompt, or all.
    """
    rows = rows_of(config)
    micro = config.train.microbatch_size or default_microbatch(rows, mesh)
    check_batch(rows, micro, mesh, _ROWS_OF)
    if config.rollout.prompts_per_step % processes:
        prompts = config.rollout.prompts_per_step
        raise UserError(f"rollout.prompts_per_step {prompts} is not a multiple of the {processes} processes")
    share, mine = config.teacher.data_fraction, config.rollout.prompts_per_step // processes
    if share and not 0 < data_prompts(share, mine) < mine:
        raise UserError(
            f"teacher.data_fraction {share}: of {mine} prompts of a process and step it is {data_prompts(share, mine)}; at least "
            "one has to be the policy's and one the data's: raise rollout.prompts_per_step, or change the fraction"
        )
    return Shapes(
        rows=rows,
        microbatch=micro,
        row_length=row_length(longest_prompt + context_tokens + config.rollout.max_completion_tokens),
        minibatches=config.train.minibatches,
        longest_prompt=longest_prompt,
        fields=fields_of(config, loss),
        extras=tuple(sorted(loss.extras)),
        viewed=config.teacher.context is not None,
    )


def data_prompts(fraction: float, prompts: int) -> int:
    """How many of ``prompts`` the rows answer themselves (``teacher.data_fraction``)."""
    return round(fraction * prompts)


def rows_of(config: cfg.GrpoConfig) -> int:
    """Sequences of one update: of both turns, over all processes."""
    turns = 1 + config.second_turn.samples
    return config.rollout.prompts_per_step * config.rollout.group_size * turns // config.train.minibatches


def default_microbatch(rows: int, mesh: Mesh | AbstractMesh) -> int:
    """Rows of a microbatch where the config names no number: at most 32 and what divides the batch."""
    sizes = [size for size in microbatch_sizes(rows, mesh) if size <= _ROWS]
    return sizes[-1] if sizes else min(rows, _ROWS)


def row_length(longest: int) -> int:
    """Tokens of a row that holds the longest sequence: a multiple of 64 as kernels like it, of 16 where 64 is a lot."""
    step = 64 if longest > 512 else 16
    return math.ceil(longest / step) * step


def longest_prompt(config: cfg.GrpoConfig, first: int, phrase_tokens: int) -> int:
    """Most tokens of a prompt of either turn, where the first turn's have at most ``first``.

    The second turn's prompt holds the first, its completion and a phrase of ``phrase_tokens`` (with its template).
    """
    return first + (config.rollout.max_completion_tokens + phrase_tokens if config.second_turn.samples else 0)


def keeps_reference(config: cfg.GrpoConfig, loss: Loss) -> bool:
    """Whether the reference scores every rollout: for a KL, a loss that reads it, or a teacher that is refreshed with it."""
    moves = config.teacher.weights == "start" and config.kl.refresh_every is not None
    return bool(config.kl.coef) or "ref_logp" in loss.needs or moves


def shares_reference(config: cfg.GrpoConfig, loss: Loss) -> bool:
    """Whether the teacher is the reference that the run keeps anyway: one copy of its parameters serves both."""
    return config.teacher.weights == "start" and keeps_reference(config, loss)


def scores_all(config: cfg.GrpoConfig, loss: Loss) -> bool:
    """Whether the policy scores all of a rollout before it is updated: for a rule over the whole step, for an input of the
    loss, or for rows' own answers, of which no sampler knows log-probs."""
    return loss.select is not None or OLD_ENTROPY in loss.extras or config.teacher.data_fraction > 0 or config.rollout.expert


def minibatches_scored(config: cfg.GrpoConfig, loss: Loss) -> int:
    """How many minibatches of a rollout, the last ones, the policy scores before it is updated.

    The first update has ratio 1 by definition: it takes its own log-probs as the old ones, and later updates of its minibatch
    keep them.
    """
    if scores_all(config, loss):
        return config.train.minibatches
    return config.train.minibatches - 1 if config.train.updates_per_rollout > 1 else 0


OLD_ENTROPY = "old_entropy"  # an input that a loss of one's own may declare; the scoring pass fills it
SUM_PI_SQUARED = "sum_pi_squared"  # another: sum_v pi_v^2 of the policy that sampled, which a pass of its own fills
STEP = "step"  # a third: the number of the run's step, from 1, on every token
# Others are tokens of the update / those of some of its sequences, on these, 0 elsewhere:
POSITIVE = "positive"  # of the samples with a reward above 0
EXPERT = "expert"  # of the rows' own answers (``rollout.expert``)
SAMPLED = "sampled"  # of what the policy drew


def fields_of(config: cfg.GrpoConfig, loss: Loss) -> tuple[str, ...]:
    """The optional float fields of a batch, in addition to the mask."""
    present = {
        "advantages": True,
        "sampler_logp": True,
        "group_tokens": True,
        "ref_logp": keeps_reference(config, loss),
        "old_logp": config.train.updates_per_rollout > 1 or scores_all(config, loss),
        "selected": loss.select is not None,
        "entropy_coef": config.entropy.target is not None,
        "kl_coef": config.kl.target is not None and (config.kl.placement or loss.kl_placement) == "loss",
    }
    return tuple(name for name, there in present.items() if there)
