"""One step's rollout: prompts, completions, rewards; resampling of groups that teach nothing; corrections."""

import dataclasses
import math
import time

import jax
import numpy as np

from jaxreason import config as cfg
from jaxreason.data.chat import Chat
from jaxreason.data.prompts import Prompt, Prompts
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.losses import advantage
from jaxreason.rewards.pool import RewardPool
from jaxreason.rollout import Engine
from jaxreason.train import correction, hosts
from jaxreason.train.evaluation import sample_of
from jaxreason.train.rollouts import Sequence, labels
from jaxreason.train.run import console

_ROUNDS = 64  # draws of one step that differ in their key: resampling rounds and the second layer
_SPEAK_S = 15.0  # a long rollout says so this often


@dataclasses.dataclass
class Rollout:
    """What one step drew, in groups that share a prompt."""

    groups: list[list[Sequence]]
    seconds: dict[str, float]
    cursor: int  # prompts of the stream used so far
    counts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Collector:
    """Draws and grades. With several processes each takes its share of a step's prompts."""

    config: cfg.GrpoConfig
    engine: Engine
    prompts: Prompts
    tokenizer: Tokenizer
    chat: Chat
    pool: RewardPool

    def __call__(self, weights: dict, step: int, cursor: int, params_step: int) -> Rollout:
        """The groups of one step, from weights that are those of optimizer step ``params_step``."""
        rollout = self.config.rollout
        wanted = rollout.prompts_per_step // jax.process_count()
        kept: list[list[Sequence]] = []
        spare: list[list[Sequence]] = []  # groups without a gradient: they fill the step if rounds run out
        seconds, failed = {"rollout": 0.0, "reward": 0.0}, 0
        for attempt in range(rollout.resample_rounds + 1):
            missing = wanted - len(kept)
            first, together = _numbers(missing)
            if together == 0:
                break
            chosen = [prompt_at(self.prompts, cursor + first + i, self.config) for i in range(missing)]
            cursor += together
            groups, errors = self._draw(
                weights, chosen, rollout.group_size, step, attempt, params_step, first, len(kept) + len(spare), seconds
            )
            failed += errors
            if rollout.resample_rounds == 0:
                kept = groups
                break
            rewards = np.array([[s.reward for s in g] for g in groups]).reshape(len(groups), rollout.group_size)
            useful = advantage.informative_groups(rewards)
            kept += [g for g, ok in zip(groups, useful) if ok]
            spare += [g for g, ok in zip(groups, useful) if not ok]
        discarded = max(0, len(kept) + len(spare) - wanted)
        first = jax.process_index() * wanted
        kept = [[dataclasses.replace(s, group=first + p) for s in g] for p, g in enumerate((kept + spare)[:wanted])]
        counts = {"resampled_groups": float(discarded), "reward_errors": float(failed)}
        return Rollout(kept, seconds, cursor, counts)

    def corrections(self, weights: dict, step: int, first: Rollout, params_step: int, longest: int) -> list[list[Sequence]]:
        """MGRPO's second layer: the corrections of every completion, in its order; none of one that is too long."""
        settings, seed = self.config.correction, self.config.run.seed
        sources = [s for group in first.groups for s in group]
        again = [
            correction.again(
                s.prompt, s.text, correction.phrase_of(settings.phrases, seed, step, s.group * len(group) + i),
                self.chat, self.tokenizer,
            )
            for group in first.groups
            for i, s in enumerate(group)
        ]  # fmt: skip
        fits = [i for i, prompt in enumerate(again) if len(prompt.ids) <= longest]
        drawn, errors = self._draw(
            weights, [again[i] for i in fits], settings.samples, step, _ROUNDS - 1, params_step, _numbers(len(fits))[0], 0,
            first.seconds,
        )  # fmt: skip
        first.counts["reward_errors"] += errors
        first.counts["uncorrected"] = float(len(again) - len(fits))
        found: list[list[Sequence]] = [[] for _ in again]
        size = len(sources)
        base = self.config.rollout.prompts_per_step + jax.process_index() * size
        for i, group in zip(fits, drawn):
            number = sources[i].group if settings.compare == "prompt" else i
            kept = [correction.is_trained(s, settings.train) for s in group]
            found[i] = [dataclasses.replace(s, group=base + number, kept=k) for s, k in zip(group, kept)]
        return found

    def _draw(self, weights, prompts, group, step, attempt, params_step, first, offset, seconds) -> tuple[list, int]:
        """Graded groups of completions of ``prompts``, and how many samples no grader could grade.

        ``first``: number of the first prompt among all processes', for the draws; ``offset``: of its group here.
        """
        if not prompts:
            return [], 0
        clock = spoke = time.monotonic()

        def progress(finished: int, total: int, tokens: int) -> None:
            nonlocal spoke
            if jax.process_index() == 0 and (now := time.monotonic()) - spoke > _SPEAK_S:
                spoke = now
                console.print(f"step {step}: rollout {finished}/{total} completions, {tokens / (now - clock):.0f} tokens/s")

        completions = self.engine.generate(
            weights, [p.ids for p in prompts], group, self.config.run.seed, step * _ROUNDS + attempt,
            params_step=params_step, progress=progress, first_prompt=first,
        )  # fmt: skip
        if any(c.params_step != params_step for c in completions):
            raise RuntimeError("the rollout used weights of another step")
        seconds["rollout"] += time.monotonic() - clock
        clock = time.monotonic()
        limit = self.config.rollout.max_completion_tokens
        inputs = [sample_of(prompts[c.prompt_index], c, self.tokenizer, limit) for c in completions]
        graded = self.pool.grade(inputs)
        for error in graded.errors[:3]:
            console.print(f"step {step}: {error}", markup=False)
        seconds["reward"] += time.monotonic() - clock
        names = labels(self.pool.names)
        sequences = [
            Sequence(
                prompts[c.prompt_index], c, sample.completion, offset + c.prompt_index, dict(zip(names, map(float, row))),
                math.nan if total is None else float(total),
            )
            for c, sample, row, total in zip(completions, inputs, graded.rewards, graded.total)
        ]  # fmt: skip
        return [sequences[i : i + group] for i in range(0, len(sequences), group)], len(graded.errors)


def _numbers(count: int) -> tuple[int, int]:
    """Of ``count`` things a process, numbered over all processes in turn: the first one's number here, and how many in all."""
    counts = hosts.gather(np.array([count]))
    return int(counts[: jax.process_index()].sum()), int(counts.sum())


def prompt_at(prompts: Prompts, cursor: int, config: cfg.GrpoConfig) -> Prompt:
    """Prompt number ``cursor`` of the endless stream of epochs, each in its own order."""
    epoch, place = divmod(cursor, len(prompts))
    if not config.data.shuffle:
        return prompts[place]
    return prompts[int(np.random.default_rng([config.run.seed, epoch]).permutation(len(prompts))[place])]
