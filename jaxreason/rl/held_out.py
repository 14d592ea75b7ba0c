"""What GRPO measures on held-out problems."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxreason import config as cfg
from jaxreason.data.chat import Chat
from jaxreason.data.prompts import Prompt, Prompts
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.evaluate.accuracy import Grading, evaluate
from jaxreason.rl import turns
from jaxreason.sampler import Job, Sampler, Sampling
from jaxreason.types import TrainState


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Greedy accuracy; avg@k where ``eval.samples`` asks for it; with a second turn, what that mends."""

    config: cfg.GrpoConfig
    sampler: Sampler
    problems: Prompts
    tokenizer: Tokenizer
    chat: Chat
    grading: Grading

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The metrics ``eval_*`` of a state's parameters."""
        self.sampler.load(state.model_params, int(state.step))
        found, records = self._measure(self.problems.prompts, self._job(0.0))
        found = {f"eval_{name}": value for name, value in found.items()}
        if self.config.second_turn.samples:
            phrase = self.config.second_turn.phrases[0]
            again = [
                turns.again(prompt, record["completion"], phrase, self.chat, self.tokenizer)
                for prompt, record in zip(self.problems.prompts, records)
            ]
            _, after = self._measure(again, self._job(0.0))
            right = [np.array([r["correct"] for r in turn]) for turn in (records, after)]
            found |= {f"eval_{name}": value for name, value in turns.changes(*right).items()}
        if (samples := self.config.eval.samples) > 1:
            metrics, _ = self._measure(self.problems.prompts, self._job(self.config.eval.temperature, samples))
            found |= {f"eval_avg_at_{samples}{name.removeprefix('accuracy')}": metrics[name]
                      for name in ("accuracy", "accuracy_low", "accuracy_high")}  # fmt: skip
        self.sampler.release()
        return found

    def _job(self, temperature: float, samples: int = 1) -> Job:
        settings = self.config.eval
        sampling = Sampling(temperature=temperature, max_completion_tokens=settings.max_completion_tokens)
        return Job(sampling, samples, self.config.run.seed if samples > 1 else 0, slots=settings.slots)

    def _measure(self, prompts: Sequence[Prompt], job: Job) -> tuple[dict[str, float], list[dict]]:
        return evaluate(self.sampler, prompts, self.tokenizer, self.grading, job)
