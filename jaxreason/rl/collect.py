"""One step's rollout: prompts, completions, rewards; resampling of groups that teach nothing; the second turn."""

import dataclasses
import math
import time
from collections.abc import Sequence as Many

import jax
import numpy as np

from jaxreason import config as cfg
from jaxreason.data.chat import Chat
from jaxreason.data.prompts import Prompt, PromptStream
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import present
from jaxreason.evaluate.accuracy import sample_of
from jaxreason.losses import advantage
from jaxreason.model import ModelConfig
from jaxreason.rewards.pool import Graded, RewardPool
from jaxreason.rewards.sample import Sample
from jaxreason.rl import turns
from jaxreason.rl.sequence import Groups, Sequence, drawn_metrics, labels, mean, metrics_of
from jaxreason.rl.shapes import data_prompts
from jaxreason.sampler import ROUNDS, Completion, Job, Sampler, Sampling, sampling_of
from jaxreason.sampler.engine.slots import Room, that_fit
from jaxreason.terminal import NO_TOKENS_YET, Working, console
from jaxreason.train import hosts


@dataclasses.dataclass
class Rollout:
    """What one step drew, in groups that share a prompt."""

    groups: Groups
    second: Groups  # the corrections of each completion, in their order; [] without a second turn
    seconds: dict[str, float]
    cursor: int  # prompts of the stream used so far
    metrics: dict[str, float]

    @property
    def sequences(self) -> list[Sequence]:
        """Of both turns, in the order of ``groups`` and ``second``."""
        return [s for group in [*self.groups, *self.second] for s in group]


def slots_of(config: cfg.GrpoConfig, model: ModelConfig, longest_prompt: int, room: Room) -> int:
    """Sequences that are decoded at once, over all devices: the config's number or, for ``auto``, what ``room`` holds."""
    rollout = config.rollout
    if rollout.slots != "auto":
        return rollout.slots
    sequences = rollout.prompts_per_step * rollout.group_size * max(1, config.second_turn.samples)
    return that_fit(model, longest_prompt, rollout.max_completion_tokens, sequences, room)


def rollout_job(config: cfg.GrpoConfig) -> Job:
    """How completions are drawn; every process decodes its share of the slots, which are settled."""
    slots = math.ceil(int(config.rollout.slots) / jax.process_count())
    drawn = config.rollout.group_size - config.rollout.expert
    return Job(sampling_of(config.rollout), drawn, config.run.seed, slots=slots)


@dataclasses.dataclass(frozen=True)
class Collector:
    """Draws and grades. With several processes each takes its share of a step's prompts.

    ``longest_prompt``: most tokens of a prompt of either turn; a correction whose prompt is longer is left out. ``greedy``:
    every prompt is also completed greedily, for an estimator that compares with that reward.
    """

    config: cfg.GrpoConfig
    sampler: Sampler
    prompts: PromptStream
    tokenizer: Tokenizer
    chat: Chat
    pool: RewardPool
    longest_prompt: int
    greedy: bool = False

    def __call__(self, step: int, cursor: int, params_step: int) -> Rollout:
        """Both turns of one step, from the sampler's weights, which are those of optimizer step ``params_step``."""
        rollout = self._first_turn(step, cursor, params_step)
        sequences = [s for group in rollout.groups for s in group]
        rollout.metrics |= metrics_of([s for s in sequences if s.drawn], labels(self.pool.names))
        if self.config.rollout.expert:
            experts = [s.reward for s in sequences if s.source == "expert"]
            rollout.metrics["expert_reward"] = mean(hosts.gather(np.array(experts, np.float64)))
        if self.config.second_turn.samples:
            self._second_turn(rollout, step, params_step)
            rollout.metrics |= turns.metrics([s for group in rollout.groups for s in group], rollout.second)
        return rollout

    def _first_turn(self, step: int, cursor: int, params_step: int) -> Rollout:
        rollout = self.config.rollout
        wanted = rollout.prompts_per_step // jax.process_count()
        given, together = self._given(wanted, cursor, params_step)
        cursor += together
        useful: Groups = []
        spare: Groups = []  # groups without a gradient: they fill the step if rounds run out
        seconds, failed = {"rollout": 0.0, "reward": 0.0}, 0
        for attempt in range(rollout.resample_rounds + 1):
            missing = wanted - len(given) - len(useful)
            first, together = _numbers(missing)
            if together == 0:
                break
            chosen = [self.prompts.at(cursor + first + i) for i in range(missing)]
            cursor += together
            job = dataclasses.replace(rollout_job(self.config), draw=step * ROUNDS + attempt, first_prompt=first)
            groups, errors = self._draw(chosen, job, step, params_step, len(useful) + len(spare), seconds)
            failed += errors
            if rollout.resample_rounds == 0:
                useful = groups
                break
            rewards = np.array([[s.reward for s in g] for g in groups]).reshape(len(groups), rollout.group_size)
            informative = advantage.informative_groups(rewards)
            useful += [g for g, ok in zip(groups, informative) if ok]
            spare += [g for g, ok in zip(groups, informative) if not ok]
        metrics = {"resampled_groups": float(max(0, len(useful) + len(spare) - wanted)), "reward_errors": float(failed)}
        if rollout.resample_rounds:
            # The step's own metrics are those of the groups that were kept; these are of everything that was drawn.
            metrics |= drawn_metrics(useful + spare)
        first = jax.process_index() * wanted
        groups = (useful + spare + given)[:wanted]
        kept = [[dataclasses.replace(s, group=first + p) for s in g] for p, g in enumerate(groups)]
        return Rollout(kept, [], seconds, cursor, metrics)

    def _given(self, wanted: int, cursor: int, params_step: int) -> tuple[Groups, int]:
        """Groups of one, the answers that rows give themselves (``teacher.data_fraction``), and how many over all processes."""
        count = data_prompts(self.config.teacher.data_fraction, wanted)
        if count == 0:  # in every process, or in none
            return [], 0
        first, together = _numbers(count)
        names = labels(self.pool.names)
        groups: Groups = []
        for prompt in (self.prompts.at(cursor + first + i) for i in range(count)):
            reply, rewards = present(prompt.reply, "Prompt.reply"), dict.fromkeys(names, math.nan)
            groups.append([Sequence(prompt, _own(prompt, 0, 0, params_step), reply, 0, rewards, math.nan, source="data")])
        return groups, together

    def _second_turn(self, rollout: Rollout, step: int, params_step: int) -> None:
        """MGRPO: adds the corrections of every completion, in its order; none of one whose prompt is too long."""
        settings, seed = self.config.second_turn, self.config.run.seed
        sources = [s for group in rollout.groups for s in group]
        numbers = [s.group * len(group) + i for group in rollout.groups for i, s in enumerate(group)]
        again = [
            turns.again(s.prompt, s.text, turns.phrase_of(settings.phrases, seed, step, number), self.chat, self.tokenizer)
            for s, number in zip(sources, numbers)
        ]
        fits = [i for i, prompt in enumerate(again) if len(prompt.ids) <= self.longest_prompt]
        job = dataclasses.replace(
            rollout_job(self.config), samples=settings.samples, draw=step * ROUNDS + ROUNDS - 1,
            first_prompt=_numbers(len(fits))[0],
        )  # fmt: skip
        drawn, errors = self._draw([again[i] for i in fits], job, step, params_step, 0, rollout.seconds)
        rollout.metrics["reward_errors"] += errors
        rollout.metrics["uncorrected"] = float(len(again) - len(fits))
        found: Groups = [[] for _ in again]
        base = self.config.rollout.prompts_per_step + jax.process_index() * len(sources)
        for i, group in zip(fits, drawn):
            number = sources[i].group if settings.compare == "prompt" else i
            kept = [turns.is_trained(s, settings.train) for s in group]
            found[i] = [dataclasses.replace(s, group=base + number, kept=k) for s, k in zip(group, kept)]
        rollout.second = found

    def _draw(
        self, prompts: Many[Prompt], job: Job, step: int, params_step: int, offset: int, seconds: dict[str, float]
    ) -> tuple[Groups, int]:
        """Graded groups of completions of ``prompts``, numbered from ``offset``, and how many samples no grader could grade."""
        if not prompts:
            return [], 0
        clock = time.monotonic()
        with Working("rollout", len(prompts) * job.samples, NO_TOKENS_YET) as show:

            def drawn(done: int, _: int, tokens: int) -> None:
                show(done, f"{tokens / (time.monotonic() - clock):.0f} tok/s")

            completions = self.sampler.generate([p.ids for p in prompts], job, drawn)
        if any(c.params_step != params_step for c in completions):
            raise RuntimeError("the rollout used weights of another step")
        seconds["rollout"] += time.monotonic() - clock
        size = job.samples + self.config.rollout.expert
        if self.config.rollout.expert:
            own = [_own(prompt, i, job.samples, params_step) for i, prompt in enumerate(prompts)]
            completions = sorted([*completions, *own], key=lambda c: (c.prompt_index, c.sample_index))
        inputs, graded = self._grade(prompts, completions, job, step, seconds)
        greedy: list[float | None] = [None] * len(prompts)
        if self.greedy:
            clock = time.monotonic()
            sampling = Sampling(temperature=0.0, max_completion_tokens=job.sampling.max_completion_tokens)
            best = self.sampler.generate([p.ids for p in prompts], dataclasses.replace(job, sampling=sampling, samples=1))
            seconds["rollout"] += time.monotonic() - clock
            totals = self._grade(prompts, best, job, step, seconds)[1].total
            greedy = [math.nan if total is None else float(total) for total in totals]
        names = labels(self.pool.names)
        sequences = [
            Sequence(
                prompts[c.prompt_index], c, sample.completion, offset + c.prompt_index, dict(zip(names, map(float, row))),
                math.nan if total is None else float(total), greedy=greedy[c.prompt_index], extras=dict(extras),
                source="policy" if c.sample_index < job.samples else "expert",
            )
            for c, sample, row, total, extras in zip(completions, inputs, graded.rewards, graded.total, graded.extras)
        ]  # fmt: skip
        return [sequences[i : i + size] for i in range(0, len(sequences), size)], len(graded.errors)

    def _grade(
        self, prompts: Many[Prompt], completions: list[Completion], job: Job, step: int, seconds: dict[str, float]
    ) -> tuple[list[Sample], Graded]:
        """What the graders were given, and what they said; the first errors are shown."""
        clock, limit = time.monotonic(), job.sampling.max_completion_tokens
        inputs = [sample_of(prompts[c.prompt_index], c, self.tokenizer, limit) for c in completions]
        graded = self.pool.grade(inputs)
        for error in graded.errors[:3]:
            console.print(f"step {step}: {error}", markup=False)
        seconds["reward"] += time.monotonic() - clock
        return inputs, graded


def _own(prompt: Prompt, prompt_index: int, sample_index: int, params_step: int) -> Completion:
    """A row's own answer as a completion, whose log-probs no sampler knows (0)."""
    tokens = np.array(prompt.reply_ids, np.int32)
    unknown = np.zeros(len(tokens), np.float32)
    return Completion(prompt_index, sample_index, tokens, unknown, unknown, False, params_step)


def _numbers(count: int) -> tuple[int, int]:
    """Of ``count`` things a process, numbered over all processes in turn: the first one's number here, and how many in all."""
    counts = hosts.gather(np.array([count]))
    return int(counts[: jax.process_index()].sum()), int(counts.sum())
