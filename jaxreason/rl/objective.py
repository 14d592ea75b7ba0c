"""What a GRPO config optimizes: its loss, its advantage estimator, its rewards and hooks, checked together at the start."""

import dataclasses
from collections.abc import Callable

from jaxreason import config as cfg
from jaxreason import losses, plugins, rewards
from jaxreason.errors import UserError
from jaxreason.rl.shapes import (
    EXPERT,
    OLD_ENTROPY,
    POSITIVE,
    SAMPLED,
    STEP,
    SUM_PI_SQUARED,
    keeps_reference,
    shares_reference,
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Everything between completions and a gradient that a config chooses by name."""

    loss: losses.Loss
    estimator: losses.Estimator
    graders: tuple[tuple[rewards.Reward, float], ...]  # with their weights
    hooks: tuple[tuple[str, Callable], ...]  # by name
    placement: str  # of the KL: ``loss`` or ``reward``

    @property
    def greedy(self) -> bool:
        """Whether the estimator compares with each prompt's greedy completion."""
        return "greedy_P" in self.estimator.reads

    @property
    def squares(self) -> bool:
        """Whether the sums of squared probabilities are read, by the estimator or the loss."""
        return SUM_PI_SQUARED in self.estimator.needs | self.loss.extras

    def kl_coef(self, config: cfg.GrpoConfig) -> float:
        """The config's, or what the loss has without one: its preset's."""
        return float(self.loss.options.get("kl_coef", 0.0)) if config.kl.coef is None else config.kl.coef


def objective_of(config: cfg.GrpoConfig) -> Objective:
    """Finds and checks all of it. Raises UserError for unknown names and for choices that exclude each other."""
    loss = find_loss(config)
    name = config.advantage.name or loss.advantage or "grpo"
    estimator = losses.advantage.get(name, preset=loss.advantage_preset, **config.advantage.options)
    placement = config.kl.placement or loss.kl_placement
    if config.kl.coef and placement == "reward" and "rewards_F_P_G" in estimator.reads:
        raise UserError(f"kl.placement=reward: advantage {name} reads each reward by itself; use kl.placement=loss")
    graders = tuple((rewards.get(term.name, **term.options), term.weight) for term in config.reward.functions)
    hooks = tuple((name, plugins.load(name, "rollout.hooks")) for name in config.rollout.hooks)
    fills = dict.fromkeys((OLD_ENTROPY, SUM_PI_SQUARED), "the policy before its update")
    fills |= {POSITIVE: "the sign of the rewards", STEP: "the loop"}
    if config.rollout.expert:
        fills |= dict.fromkeys((EXPERT, SAMPLED), "who answered")
    elif EXPERT in loss.extras:
        raise UserError(f"loss.name {loss.name} learns from the rows' own answers beside the policy's: set rollout.expert=true")
    if config.rollout.expert and (EXPERT not in loss.extras or placement == "reward"):
        reads = f"loss.name {loss.name} does not tell it from the policy's; use luffy, chord, or a loss that reads {EXPERT}"
        known = "the policy drew it with no log-probs, which kl.placement=reward needs; use kl.placement=loss"
        raise UserError(f"rollout.expert puts the row's own answer into each group: {known if EXPERT in loss.extras else reads}")
    fills |= {extra: f"reward {reward.name}" for reward, _ in graders for extra in reward.fills}
    fills |= {extra: f"advantage {name}" for extra in estimator.fills}
    fills |= {extra: f"hook {name}" for name, hook in hooks for extra in plugins.fills(hook)}
    losses.check_filled(loss, fills)
    if loss.reselects and config.train.minibatches > 1:
        raise UserError(
            f"loss.name {loss.name} compares the completions of a prompt with each other, and train.minibatches "
            f"{config.train.minibatches} puts them into different updates; set train.minibatches=1"
        )
    for extra in sorted(estimator.needs - set(fills)):
        raise UserError(
            f"advantage.name {name} reads {extra} of every completion, and nothing fills it; a reward or a hook fills it that "
            f"declares fills=({extra!r},)"
        )
    if "greedy_P" in estimator.reads and config.second_turn.samples and config.second_turn.compare == "prompt":
        raise UserError(
            f"advantage.name {name} compares with one greedy completion of a prompt, and second_turn.compare=prompt puts "
            "corrections of several together; use second_turn.compare=completion"
        )
    if shares_reference(config, loss) and config.teacher.offload != config.kl.offload:
        raise UserError(
            f"teacher.offload {config.teacher.offload}: the teacher is the reference, and kl.offload is {config.kl.offload}; "
            "give both one value"
        )
    if config.kl.refresh_every is not None and not keeps_reference(config, loss):
        raise UserError("kl.refresh_every: there is no reference to refresh; set kl.coef, or use a loss that reads ref_logp")
    return Objective(loss, estimator, graders, hooks, placement)


def find_loss(config: cfg.GrpoConfig) -> losses.Loss:
    """The policy loss of the config, checked on a tiny batch. Raises UserError."""
    loss = bind_loss(config)
    losses.check(loss)
    return loss


def bind_loss(config: cfg.GrpoConfig) -> losses.Loss:
    """The policy loss of the config, with the KL section's and the rollout's values as its options. Raises UserError."""
    options = dict(config.loss.options)
    if ":" not in config.loss.name and config.loss.name in losses.names("policy"):
        options |= _options_from_sections(config)
    elif config.entropy.target is not None:
        raise UserError(f"entropy.target: {config.loss.name} is your own loss and adds its own bonus; leave it null")
    elif config.kl.coef and config.kl.placement != "reward":
        raise UserError(
            f"kl.coef: {config.loss.name} is your own loss and adds its own KL; set kl.coef=0 (a loss that reads ref_logp gets "
            "it all the same), or kl.placement=reward"
        )
    loss = losses.get(config.loss.name, kind="policy", preset=config.loss.preset, **options)
    if config.teacher.divergence:
        divergence = losses.divergence(config.teacher.divergence, **config.teacher.options)
        loss = dataclasses.replace(loss, divergence=divergence)
        if "teacher_divergence" not in loss.needs:
            raise UserError(f"teacher.divergence: {loss.name} is your own loss and does not read inputs.teacher_divergence")
    elif "teacher_divergence" in loss.needs:
        raise UserError(f"loss {loss.name} distils: set teacher.weights and teacher.divergence, e.g. reverse_kl")
    return loss


def _options_from_sections(config: cfg.GrpoConfig) -> dict[str, float | str]:
    """Options of a built-in loss that other sections of the config decide."""
    given = config.loss.options
    found: dict[str, float | str] = {}
    known = losses.defaults(config.loss.name)
    placement = config.kl.placement or losses.get(config.loss.name, preset=config.loss.preset).kl_placement
    for name, key in (("kl_coef", "kl.coef"), ("kl_estimator", "kl.estimator"), ("distill_coef", "teacher.coef")):
        if name in given:
            raise UserError(f"loss.options.{name}: set {key} instead")
    if config.teacher.divergence:
        found["distill_coef"] = config.teacher.coef
    if placement == "reward":
        found["kl_coef"] = 0.0  # a preset may have one
    elif config.kl.coef is not None:
        found["kl_coef"] = config.kl.coef
    if config.kl.estimator and placement == "loss":
        found["kl_estimator"] = config.kl.estimator
    if config.entropy.target is not None:
        found["entropy_coef"] = config.entropy.delta  # not 0: the loss then reads the entropy; each step sets it
    if given.get("reduce", known["reduce"]) == "token-sum/const" and "max_completion_tokens" not in given:
        found["max_completion_tokens"] = config.rollout.max_completion_tokens
    return found
