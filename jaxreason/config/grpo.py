"""The sections of a GRPO config that it does not share with SFT. A key's docstring is its documentation everywhere."""

from typing import Any, Literal

from pydantic import Field, model_validator

from jaxreason.config.schema import (
    Draw,
    Eval,
    Lora,
    Loss,
    Mesh,
    Model,
    NonNegative,
    Optimizer,
    Positive,
    Problems,
    Resolved,
    Run,
    Section,
    Train,
    check_lora,
)


class GrpoData(Problems):
    max_prompt_tokens: Positive = 512
    """Problems with a longer prompt are dropped and counted."""
    shuffle: bool = True
    """A new order each epoch, from the seed; false: source order."""


class GrpoLoss(Loss):
    name: str = "grpo"
    """A named policy loss, or ``package.module:function``."""
    preset: Literal["trl", "verl", "nemo", "prime_rl", "open_instruct", "slime", "roll"] | None = None
    """Conventions and defaults of another framework; ``options`` win over it, and a loss that it has not is refused."""


class Rollout(Draw):
    prompts_per_step: Positive = 16
    group_size: Positive = 8
    """Completions of each prompt (G)."""
    temperature: float = Field(1.0, gt=0)
    """Log-probs are of the distribution at this temperature, in the sampler and in the learner."""
    slots: Positive | Literal["auto"] = 64
    """Sequences decoded at once, on all devices together; every device has as many, rounded up. ``auto``: as many as fit."""
    offload_state: bool = False
    """Keep parameters, moments and the rest of the train state in host memory while completions are drawn: more slots fit."""
    sampler: str = "engine"
    """What draws completions: ``engine``, or a sampler of your own, ``package.module:function`` (``jaxreason.sampler``)."""
    hooks: list[str] = Field([])
    """Functions of your own that see a step's graded groups and fill the inputs that a loss of your own declares."""
    expert: bool = False
    """The last of each group's completions is the row's own answer: it is graded like the policy's, and trained by a loss that
    tells it from them (``luffy``, ``chord``, or one of your own that reads the extra ``expert``)."""
    resample_rounds: int = Field(0, ge=0, le=62)
    """DAPO's dynamic sampling: replace groups whose rewards are all equal by new prompts, at most this often a step. A step
    has 64 keys to draw with: of its rollout, of 62 further rounds and of the second turn."""


class RewardTerm(Section):
    name: str
    """A named reward, or ``package.module:function``."""
    weight: float = 1.0
    options: dict[str, Any] = Field({})


class Reward(Section):
    functions: list[RewardTerm] = Field([RewardTerm(name="accuracy")])
    """The reward is the weighted sum."""
    workers: NonNegative = 2
    """Grading processes; 0: in this one, without a time limit."""
    timeout_s: float = Field(10.0, gt=0)
    """A grader that takes longer is killed; its sample gets no reward and is counted."""
    on_error: Literal["count", "stop"] = "count"


class Advantage(Section):
    name: str | None = None
    """An estimator of ``jaxreason.losses.advantage``; null: the one that belongs to the loss."""
    options: dict[str, Any] = Field({})


class Kl(Section):
    coef: float | None = Field(None, ge=0)
    """Coefficient of the KL to the reference, the starting weights; 0: no reference model is kept; null: 0, or what
    ``loss.preset`` has."""
    placement: Literal["loss", "reward"] | None = None
    """A term of the loss by token, or k1 taken off the reward; null: as the loss's paper has it (rloo and reinforce_pp
    in the reward, the others in the loss)."""
    estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+", "k1_unbiased", "k2_unbiased", "k3_unbiased"] | None = None
    """Of the KL in the loss; null: k3, or what ``loss.preset`` has."""
    target: float | None = Field(None, gt=0)
    """Nats a token, of the metric ``kl``: above it the coefficient grows from step to step, below it it shrinks, beginning with
    ``coef`` (arXiv 1909.08593); null: ``coef`` stays."""
    gain: float = Field(0.1, gt=0)
    """By how much: a step multiplies the coefficient by 1 + gain · clip(kl / target − 1, ±0.2)."""
    refresh_every: Positive | None = None
    """Steps after which the reference becomes the policy that they trained (DeepSeek-R1: 400); checkpoints hold it then. null:
    it stays what the run started from."""
    refresh_weight: float = Field(1.0, gt=0, le=1)
    """w of such a reference: w · policy + (1 − w) · the reference so far (TR-DPO, arXiv 2404.09656); 1: the policy."""
    offload: bool = False
    """Keep the reference in host memory and copy it to the devices once a step, to score."""

    @model_validator(mode="after")
    def _first_coefficient(self):
        if self.target is not None and not self.coef:
            raise ValueError("kl.target moves the coefficient from step to step and needs its first value: set kl.coef above 0")
        return self


class Entropy(Section):
    target: float | None = Field(None, gt=0)
    """Nats a token: the bonus's coefficient rises below it and falls above it (Skywork-OR1, arXiv 2505.22312); null: the
    coefficient is the loss's option ``entropy_coef``."""
    coef: float = Field(0.0, ge=0)
    """The adaptive coefficient's first value."""
    delta: float = Field(0.005, gt=0)
    """Its change a step."""


class Teacher(Section):
    """On-policy distillation: the policy's own samples, judged token by token by a teacher."""

    weights: str | None = None
    """A model with the same tokenizer, Hugging Face directory, hub id or run; ``start``: the reference, that is the weights that
    the run began with, or what kl.refresh_every made of them; ``self``: the policy as it is at each update (with ``context``);
    null: no teacher."""
    divergence: (
        Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl"] | None
    ) = None
    """What the policy's next-token distribution is compared with the teacher's by, over the whole vocabulary: a term of the
    loss of its own (``jaxreason.losses.distill``). loss.name=distill has no other. Null: the sampled tokens alone,
    c·(log π_teacher − log π_policy) is added to their advantages."""
    options: dict[str, Any] = Field({})
    """Of the divergence: ``temperature``, ``top_k``, ``top_from``, ``tail``; ``beta`` of jsd, ``alpha`` of the skewed ones,
    ``head`` of adaptive_kl."""
    coef: float = Field(1.0, gt=0)
    """c, the weight of the teacher's part."""
    context: str | None = None
    """What the teacher is told and the policy is not: ``answer`` (the gold answer), ``solution`` (the row's own answer with its
    thought), ``peer`` (a right completion of the same prompt), or a function of your own of (sequence, group) that returns a
    text, or None where there is nothing to say; such a sequence is not distilled. Null: the teacher reads what the policy
    reads."""
    prompt: str = "{question}\n\nHere is a correct solution:\n{context}\n\nNow answer the question in your own words."
    """The user's turn that the teacher reads where there is a context."""
    max_context_tokens: Positive | None = None
    """Most tokens by which the teacher's prompt may be longer than the policy's; a sequence with more is not distilled. Null:
    what the longest context there can be needs; a function of your own needs a number."""
    data_fraction: float = Field(0.0, ge=0, lt=1)
    """Fraction of each step's prompts that are not answered by the policy: the row's own answer is distilled on instead (GKD's
    1 − λ)."""
    offload: bool = False
    """Keep the teacher in host memory and copy it to the devices once a step."""

    @model_validator(mode="after")
    def _whole(self):
        if self.weights is None and (self.divergence or self.context):
            raise ValueError("teacher.divergence and teacher.context belong to a teacher: set teacher.weights")
        if self.divergence is None and (self.options or self.context or self.data_fraction or self.weights == "self"):
            raise ValueError(
                "teacher.options, teacher.context, teacher.data_fraction and teacher.weights=self need whole distributions: set "
                "teacher.divergence, e.g. reverse_kl"
            )
        if self.weights == "self" and self.context is None:
            raise ValueError("teacher.weights=self without teacher.context is the policy itself, which teaches nothing")
        missing = [field for field in ("{question}", "{context}") if field not in self.prompt]
        if missing:
            raise ValueError(f"teacher.prompt lacks {missing[0]}")
        return self


class SecondTurn(Section):
    """MGRPO (arXiv 2506.04746): a second layer, in which the policy corrects its own first answers."""

    samples: NonNegative = 0
    """Corrections drawn of every completion (H); 0: no second layer."""
    phrases: list[str] = Field(
        [
            "Where might I have gone wrong this time? Let me double-check carefully.",
            "Wait, let me double-check that.",
            "Wait a minute, let me make sure I didn't make a mistake.",
            "Hmm, let me think if there's another way to approach this problem.",
            "Wait, maybe I can think about it like this:",
            "Another thought: maybe I can",
            "But wait, let me just make sure I didn't miss anything in the original problem.",
        ],
        min_length=1,
    )
    """What is said after the first answer; one is drawn for each."""
    compare: Literal["completion", "prompt", "first"] = "completion"
    """Whom a correction's advantage compares it with: the corrections of the same completion, all of the same prompt, or
    the first answer itself (its reward less the first answer's)."""
    train: Literal["verified", "all", "none"] = "verified"
    """Corrections that are trained: those that are right by the first reward function, all, or none (measured only)."""


class GrpoTrain(Train):
    updates_per_rollout: Positive = 1
    """Optimizer updates made from one rollout."""
    minibatches: Positive = 1
    """Parts that a rollout is split into; update u trains part u mod minibatches."""
    truncated: Literal["train", "mask"] = "train"
    """What a completion that ran into max_completion_tokens teaches: its reward, or nothing."""

    @model_validator(mode="after")
    def _whole_passes(self):
        if self.updates_per_rollout % self.minibatches:
            raise ValueError(
                f"train.updates_per_rollout {self.updates_per_rollout} is not a multiple of "
                f"train.minibatches {self.minibatches}"
            )
        return self


class GrpoEval(Eval):
    samples: Positive = 1
    """Completions of a problem in addition to the greedy one, for avg@k; 1: greedy only."""
    temperature: float = Field(0.6, gt=0)
    """Of those samples."""


class GrpoConfig(Section):
    algorithm: Literal["grpo"]
    run: Run
    model: Model
    lora: Lora = Lora()
    data: GrpoData
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    advantage: Advantage = Advantage()
    loss: GrpoLoss = GrpoLoss()
    kl: Kl = Kl()
    entropy: Entropy = Entropy()
    teacher: Teacher = Teacher()
    second_turn: SecondTurn = SecondTurn()
    optimizer: Optimizer = Optimizer()
    train: GrpoTrain
    eval: GrpoEval = GrpoEval()
    mesh: Mesh = Mesh()
    resolved: Resolved = Resolved()

    @model_validator(mode="after")
    def _splits(self):
        sequences = self.rollout.prompts_per_step * self.rollout.group_size
        if sequences % self.train.minibatches:
            raise ValueError(
                f"train.minibatches {self.train.minibatches} does not divide the {sequences} sequences of a rollout "
                "(rollout.prompts_per_step x rollout.group_size)"
            )
        return self

    @model_validator(mode="after")
    def _data(self):
        if self.teacher.data_fraction and (self.second_turn.samples or self.rollout.resample_rounds):
            raise ValueError(
                "teacher.data_fraction takes the place of completions; it does not combine with second_turn.samples or "
                "rollout.resample_rounds"
            )
        if self.rollout.expert and self.rollout.group_size < 2:
            raise ValueError("rollout.expert: a group of one is the row's answer alone; use rollout.group_size 2 or more")
        by_token = self.teacher.weights is not None and self.teacher.divergence is None
        others = {"second_turn.samples": self.second_turn.samples, "teacher.data_fraction": self.teacher.data_fraction,
                  "teacher.weights without teacher.divergence": by_token}  # fmt: skip
        if self.rollout.expert and (found := [name for name, there in others.items() if there]):
            raise ValueError(f"rollout.expert puts answers into the groups that the policy never drew; {found[0]} needs its own")
        return self

    @model_validator(mode="after")
    def _second_turn(self):
        if self.second_turn.samples == 1 and self.second_turn.compare == "completion":
            raise ValueError(
                "second_turn.samples=1 leaves a group of one, whose advantage is 0; use 2 or more, or another "
                "second_turn.compare"
            )
        return self

    @model_validator(mode="after")
    def _adapters(self):
        check_lora(self.lora, self.model, self.train)
        if self.lora.rank is None:
            return self
        reference = "beside adapters the reference is the model without them, of which there is no copy"
        refused = {
            "kl.refresh_every": (self.kl.refresh_every is not None, f"{reference} to move; leave it null"),
            "kl.offload": (self.kl.offload, f"{reference} to keep elsewhere; set it to false"),
            "teacher.weights": (self.teacher.weights == "start", "start: use kl.coef, whose reference it is, or another teacher"),
            "rollout.sampler": (self.rollout.sampler != "engine", "only the engine merges adapters for decoding; use engine"),
        }
        for key, (there, fix) in refused.items():
            if there:
                raise ValueError(f"{key} does not combine with lora.rank: {fix}")
        return self
