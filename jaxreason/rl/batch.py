"""From graded completions to the batches that updates train.

Sequences are packed once for each minibatch and put on the devices once. What scores them (reference, teacher, the policy
itself) does so there, and what the host then decides (advantages, inputs of a loss of one's own) is added field by field.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason import plugins
from jaxreason.data.pack import pack
from jaxreason.errors import UserError, present
from jaxreason.losses import Loss, PolicyInputs
from jaxreason.model.vocab import HeadStats
from jaxreason.rl.advantages import advantages_of, fill
from jaxreason.rl.objective import Objective
from jaxreason.rl.sequence import Groups, Sequence
from jaxreason.rl.shapes import EXPERT, OLD_ENTROPY, POSITIVE, SAMPLED, STEP, SUM_PI_SQUARED, Shapes
from jaxreason.train import hosts
from jaxreason.train.scoring import ScoringModel
from jaxreason.train.setup import place, put
from jaxreason.train.step import OWN_LOGP
from jaxreason.types import Batch, TeacherView

_FIXED: Mapping[str, float] = MappingProxyType({})
Place = tuple[int, slice, slice]  # row, columns of the whole sequence, columns whose targets are the completion


def order(seed: int, step: int, count: int, parts: int) -> np.ndarray:
    """Sequences in the order in which minibatches take them: as drawn for one, else shuffled."""
    return np.arange(count) if parts == 1 else np.random.default_rng([seed, step, parts]).permutation(count)


def row_layout(lengths: Many[int], row_length: int, rows: int, microbatches: int) -> list[tuple[int, int]]:
    """(row, start) of every sequence, packed in their order into at most ``rows`` rows of ``row_length`` tokens.

    As many rows as sequences always suffice. Packed row k is put where microbatch k // m finds it (row r belongs to
    microbatch r mod count), so that full rows fill the first microbatches and the step skips the empty ones.
    """
    packed = pack(np.array(lengths), row_length, packing=True, shuffle=False, seed=0, epoch=0)
    if len(packed) > rows:
        raise ValueError(f"{len(lengths)} sequences fill {len(packed)} rows of {row_length} tokens, and there are {rows}")
    size = rows // microbatches
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for k in range(len(packed)):
        start = 0
        for index in packed.row(k):
            places[index] = ((k % size) * microbatches + k // size, start)
            start += lengths[index]
    return places


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences of one minibatch with their places in rows [rows, row_length], of this process."""

    sequences: list[Sequence]
    places: list[Place]
    rows: int
    row_length: int

    @classmethod
    def of(cls, sequences: list[Sequence], row_length: int, rows: int, microbatches: int) -> "Packed":
        """Packs them in their order."""
        starts = row_layout([s.room for s in sequences], row_length, rows, microbatches)
        places = [
            (row, slice(start, start + s.length), slice(start + len(s.prompt.ids) - 1, start + s.length))
            for s, (row, start) in zip(sequences, starts)
        ]
        return cls(sequences, places, rows, row_length)

    def field(self, value: Callable[[Sequence], float | np.ndarray]) -> np.ndarray:
        """[rows, row_length] float32: a value of every sequence, or of each token, where its completion is predicted."""
        out = np.zeros((self.rows, self.row_length), np.float32)
        for s, (row, _, answer) in zip(self.sequences, self.places):
            out[row, answer] = value(s)
        return out

    def read(self, array: Array) -> list[np.ndarray]:
        """What a field [B, T] on the devices holds for every sequence, [n] each."""
        found = hosts.rows(array)
        return [found[row, answer] for row, _, answer in self.places]

    def teacher_view(self, pad_id: int) -> TeacherView[np.ndarray]:
        """The same completions after the prompts that a teacher reads, each sequence beginning where it does for the policy."""
        shape = (self.rows, self.row_length)
        tokens = np.full(shape, pad_id, np.int32)
        positions, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        source = np.broadcast_to(np.arange(self.row_length, dtype=np.int32), shape).copy()
        segments = np.zeros(self.rows, np.int32)
        for s, (row, whole, answer) in zip(self.sequences, self.places):
            prompt = s.teacher_ids or s.prompt.ids
            ids = np.concatenate([np.asarray(prompt, np.int32), s.completion.tokens])[:-1]
            segments[row] += 1
            there = slice(whole.start, whole.start + len(ids))
            tokens[row, there], positions[row, there], segment_ids[row, there] = ids, np.arange(len(ids)), segments[row]
            source[row, answer] = whole.start + len(prompt) - 1 + np.arange(len(s.completion.tokens))
        return TeacherView(tokens, positions, segment_ids, source, self.field(lambda s: float(bool(s.teacher_ids))))

    def batch(self, pad_id: int, mask_truncated: bool, first: int = 0) -> Batch[np.ndarray]:
        """What the completions alone decide, numpy; position t predicts token t + 1, and the mask covers completions.

        ``first``: the number of the first sequence in the whole step, where other processes have others.
        """
        shape = (self.rows, self.row_length)
        ints = {n: np.zeros(shape, np.int32) for n in ("positions", "segment_ids", "sequence_ids", "group_ids")}
        tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
        segments = np.zeros(self.rows, np.int32)
        for number, (s, (row, whole, _)) in enumerate(zip(self.sequences, self.places), first + 1):
            ids = np.concatenate([np.asarray(s.prompt.ids, np.int32), s.completion.tokens])
            segments[row] += 1
            tokens[row, whole], targets[row, whole] = ids[:-1], ids[1:]
            ints["positions"][row, whole], ints["segment_ids"][row, whole] = np.arange(s.length), segments[row]
            ints["sequence_ids"][row, whole], ints["group_ids"][row, whole] = number, s.group
        live = {id(s): is_live(s, mask_truncated) for s in self.sequences}
        group_tokens: dict[int, int] = {}
        for s in self.sequences:
            group_tokens[s.group] = group_tokens.get(s.group, 0) + live[id(s)] * len(s.completion.tokens)
        return Batch(
            tokens, targets, ints["positions"], ints["segment_ids"], self.field(lambda s: live[id(s)]),
            sequence_ids=ints["sequence_ids"], group_ids=ints["group_ids"],
            sampler_logp=self.field(lambda s: s.completion.behaviour_logp),
            group_tokens=self.field(lambda s: group_tokens[s.group]),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Batcher:
    """Makes a step's batches. ``score``: jitted ``(params, batch) -> HeadStats`` of the policy; ``others``: what else scores,
    by the field of a sequence that it fills (``ref_logp``, ``teacher_logp``). ``squares``: jitted ``(params, batch) -> [B, T]``
    of the policy's sums of squared probabilities; None: nothing reads them. ``teacher_prompts`` gives sequences the prompts
    that a teacher reads; None: it reads the policy's. ``scored``: as many minibatches, the last ones, get their old log-probs
    here, the others from their first update; None: all."""

    config: cfg.GrpoConfig
    objective: Objective
    shapes: Shapes
    mesh: Mesh
    pad_id: int
    score: Callable
    others: Mapping[str, ScoringModel]
    teacher_prompts: Callable[[Groups], Groups] | None = None
    squares: Callable | None = None
    scored: int | None = None

    def __call__(
        self, groups: Groups, second: Groups, params: dict, step: int, coefs: Mapping[str, float] = _FIXED
    ) -> tuple[list[Sequence], list[Batch]]:
        """(sequences of both turns with what they earned, the minibatches on the devices).

        ``params``: the policy's before the step's first update; ``coefs``: this step's adaptive coefficients, by their
        field of ``Batch``.
        """
        if self.teacher_prompts is not None:
            groups, second = self.teacher_prompts(groups), self.teacher_prompts(second)
        sequences = [s for group in [*groups, *second] for s in group]
        count = self.shapes.minibatches
        parts = np.array_split(order(self.config.run.seed, step, len(sequences), count), count)
        rows = self.shapes.rows // jax.process_count()
        packed = [
            Packed.of([sequences[i] for i in part], self.shapes.row_length, rows, self.shapes.microbatches) for part in parts
        ]
        first = jax.process_index() * rows
        batches = [put(self._known(p, first), self.mesh) for p in packed]
        batches, scored = self._scored(batches, packed, parts, sequences)
        if self.squares is not None:
            for batch, p, part in zip(batches, packed, parts):
                for i, values in zip(part, p.read(self.squares(params, batch))):
                    scored[i] = dataclasses.replace(scored[i], extras=scored[i].extras | {SUM_PI_SQUARED: values})
        for k, (p, part) in enumerate(zip(packed, parts)):
            for i, (row, _, answer) in zip(part, p.places):
                scored[i] = dataclasses.replace(scored[i], place=(k, row, answer))
        finished = self._decided(scored, groups, second, coefs)
        packed = [dataclasses.replace(p, sequences=[finished[i] for i in part]) for p, part in zip(packed, parts)]
        own = 0 if self.scored is None else count - self.scored
        done = [self._completed(b, p, None if k < own else params, step, coefs) for k, (b, p) in enumerate(zip(batches, packed))]
        return finished, done

    def _known(self, packed: Packed, first: int) -> Batch[np.ndarray]:
        """What the completions alone decide; ``first``: the number of the first sequence in the whole step."""
        batch = packed.batch(self.pad_id, self.config.train.truncated == "mask", first)
        return dataclasses.replace(batch, teacher=packed.teacher_view(self.pad_id)) if self.shapes.viewed else batch

    def reselected(self, step: int, batch: Batch, params: dict) -> Batch:
        """The batch with what the loss's rule picks at ``params``, where it is one of the current policy."""
        loss = self.objective.loss
        if not loss.reselects:
            return batch
        picked = selected(present(loss.select, "Loss.select"), self.score(params, batch), batch, self.config.run.seed, step)
        return dataclasses.replace(batch, selected=picked)

    def _scored(
        self, batches: list[Batch], packed: list[Packed], parts: list[np.ndarray], sequences: list[Sequence]
    ) -> tuple[list[Batch], list[Sequence]]:
        """Adds the log-probs of the reference to the batches, and those of all other models to the sequences."""
        columns: dict[str, list] = {}
        for field, model in self.others.items():
            params, column = model.params(), [None] * len(sequences)
            for k, (p, part) in enumerate(zip(packed, parts)):
                logp = model.score(params, batches[k]).logp
                if field == "ref_logp":
                    batches[k] = dataclasses.replace(batches[k], ref_logp=logp)
                for i, values in zip(part, p.read(logp)):
                    column[i] = values
            columns[field] = column
        return batches, [
            dataclasses.replace(s, **{field: column[i] for field, column in columns.items()}) for i, s in enumerate(sequences)
        ]

    def _decided(
        self, scored: list[Sequence], groups: Groups, second: Groups, coefs: Mapping[str, float]
    ) -> list[Sequence]:
        """The sequences with their advantages and with the inputs that hooks and the estimator fill."""
        rest = iter(scored)
        first, after = ([[next(rest) for _ in group] for group in turn] for turn in (groups, second))
        for name, hook in self.objective.hooks:
            for extra, values in run_hook(name, hook, [*first, *after]).items():
                fill([*first, *after], extra, values, f"hook {name}")
        config = self.config
        if "kl_coef" in coefs:  # where the KL is in the reward, it is in the advantages
            config = config.model_copy(update={"kl": config.kl.model_copy(update={"coef": coefs["kl_coef"]})})
        turns = advantages_of(first, after, self.objective, config)
        return [s for turn in turns for group in turn for s in group]

    def _completed(self, batch: Batch, packed: Packed, params: dict | None, step: int, coefs: Mapping[str, float]) -> Batch:
        """The batch with every field that the loss reads; without ``params`` the update takes its own log-probs as the old."""
        loss = self.objective.loss
        added = {"advantages": packed.field(lambda s: s.advantage)}
        everywhere = functools.partial(np.full, (packed.rows, packed.row_length), dtype=np.float32)
        for name in sorted(coefs.keys() & set(self.shapes.fields)):
            added[name] = everywhere(coefs[name])
        given = loss.extras - {OLD_ENTROPY, STEP, *SHARES}
        extras = {name: packed.field(functools.partial(_extra, loss, name)) for name in given}
        if STEP in loss.extras:
            extras[STEP] = everywhere(step)
        for name in loss.extras & set(SHARES):
            extras[name] = _share(packed, SHARES[name], self.config.train.truncated == "mask")
        placed, more = ({name: place(x, self.mesh) for name, x in fields.items()} for fields in (added, extras))
        batch = dataclasses.replace(batch, extras=more, **cast(dict[str, Any], placed))
        if "old_logp" in self.shapes.fields and params is None:
            batch = dataclasses.replace(batch, old_logp=place(everywhere(OWN_LOGP), self.mesh))
        elif "old_logp" in self.shapes.fields:
            stats = self.score(params, batch)
            old = {OLD_ENTROPY: stats.entropy} if OLD_ENTROPY in loss.extras else {}
            batch = dataclasses.replace(batch, old_logp=stats.logp, extras=batch.extras | old)
            if self.config.teacher.data_fraction or self.config.rollout.expert:  # what no sampler drew has no gap to one
                unknown = place(packed.field(lambda s: float(not s.drawn)), self.mesh)
                drawn = present(batch.sampler_logp, "Batch.sampler_logp")
                batch = dataclasses.replace(batch, sampler_logp=jnp.where(unknown > 0, stats.logp, drawn))
            if loss.select is not None:
                batch = dataclasses.replace(batch, selected=selected(loss.select, stats, batch, self.config.run.seed, step))
        return batch


def selected(select: Callable[..., Array], stats: HeadStats, batch: Batch, seed: int, step: int) -> Array:
    """What the loss's step-wide rule picks at the policy that ``stats`` are of."""
    inputs = PolicyInputs(
        stats.logp, present(batch.old_logp, "Batch.old_logp"), present(batch.advantages, "Batch.advantages"), batch.loss_mask,
        entropy=stats.entropy, sampler_logp=batch.sampler_logp, sequence_ids=batch.sequence_ids, group_ids=batch.group_ids,
        extras=batch.extras,
    )  # fmt: skip
    return select(inputs, jax.random.fold_in(jax.random.key(seed), step))


SHARES: Mapping[str, Callable[[Sequence], bool]] = MappingProxyType({
    POSITIVE: lambda s: s.drawn and s.reward > 0,
    EXPERT: lambda s: s.source == "expert",
    SAMPLED: lambda s: s.drawn,
})  # fmt: skip


def _share(packed: Packed, belongs: Callable[[Sequence], bool], mask_truncated: bool) -> np.ndarray:
    """[rows, row_length] 1 / the share of the update's trained tokens that the sequences which belong have, on their tokens, 0
    elsewhere: times it, a sum over all tokens / their number is the mean over those."""
    live = [s for s in packed.sequences if is_live(s, mask_truncated)]
    some = {id(s) for s in live if belongs(s)}
    counts = [sum(len(s.completion.tokens) for s in live if id(s) in of) for of in (set(map(id, live)), some)]
    tokens, theirs = hosts.gather(np.array([counts], np.float64)).sum(axis=0)
    return packed.field(lambda s: tokens / theirs if id(s) in some else 0.0)


def is_live(sequence: Sequence, mask_truncated: bool) -> bool:
    """Whether a sequence's tokens are trained."""
    return sequence.trained and not (mask_truncated and sequence.completion.truncated)


def _extra(loss: Loss, name: str, sequence: Sequence) -> np.ndarray | float:
    if name in sequence.extras:
        return sequence.extras[name]
    if not sequence.trained:  # what could not be graded has no per-token reward either, and is masked
        return 0.0
    raise UserError(
        f"loss {loss.name} reads extras[{name!r}], and nothing filled it for a completion of {sequence.prompt.user!r}; what "
        "declares that it fills it has to do so for every sample"
    )


def run_hook(name: str, hook: Callable, groups: Groups) -> Mapping[str, Many]:
    """What a hook returns: name → [P][G] of [n]. Raises UserError, which names the hook, for whatever goes wrong in it."""
    try:
        found = hook(groups)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"rollout.hooks {name}: {type(error).__name__}: {error}") from error
    declared = plugins.fills(hook)
    if not isinstance(found, Mapping) or set(found) != set(declared):
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise UserError(f"rollout.hooks {name}: it declares that it fills {sorted(declared)} and returned {got}")
    return found
