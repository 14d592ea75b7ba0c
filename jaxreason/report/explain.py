"""What the numbers of a run are called on a page, and a sentence for each that says how to read it."""

METRICS: dict[str, tuple[str, str]] = {
    "reward": ("Reward", "Mean reward of the step's completions on training prompts: it moves with the prompts drawn."),
    "eval_accuracy": (
        "Held-out accuracy",
        "Share of problems that are never trained on and are answered right by greedy decoding; what a comparison is decided by.",
    ),
    "completion_tokens": (
        "Completion length, tokens", "Mean tokens of a completion; a loss that divides by length or does not changes it.",
    ),
    "entropy": (
        "Entropy, nats a token",
        "Mean entropy of the next-token distribution: near 0 the completions of a group are alike and teach nothing.",
    ),
    "kl": (
        "KL to the reference, nats a token",
        "How far the policy moved from the weights it started with, by the loss's own estimator.",
    ),
    "policy_kl": (
        "KL from the sampling policy",
        "How far the policy moved since it sampled this rollout, by token whatever the loss's own ratio is; 0 at one update a "
        "rollout.",
    ),
    "clip_fraction": (
        "Clipped tokens, fraction",
        "Share of tokens whose ratio the loss bounds, at the loss's own level; most bounds take a token's gradient away.",
    ),
    "grad_norm": (
        "Gradient norm",
        "Over all parameters, before clipping. Losses that aggregate differently differ in scale, not thereby in direction.",
    ),
    "sampler_gap": (
        "Sampler gap, nats a token",
        "Mean |log-prob of the learner − log-prob of the sampler|: rounding of two programs that should agree.",
    ),
    "loss": ("Loss", "The value that is minimised. A policy loss's says little: its advantages have mean 0."),
    "eval_loss": ("Held-out loss, nats a token", "Mean negative log-likelihood of rows that are never trained on."),
    "clip_low_fraction": ("Clipped from below, fraction", "Share of tokens whose ratio fell below the loss's lower bound."),
    "clip_high_fraction": ("Clipped from above, fraction", "Share of tokens whose ratio rose above the loss's upper bound."),
    "ratio_mean": ("Ratio, mean", "Mean ratio of policy to sampling policy by token; 1 where nothing moved."),
    "ratio_square_mean": (
        "Ratio squared, mean", "Its excess over the squared mean is the variance that importance weights add to the gradient.",
    ),
    "ratio_max": ("Highest ratio", "The largest ratio of any token in the step."),
    "ratio_min": ("Lowest ratio", "The smallest ratio of any token in the step."),
    "sampler_gap_max": ("Sampler gap, largest", "The sampler gap of the token where it is largest, in nats."),
    "nll": ("Negative log-likelihood", "Of the supervised tokens, nats a token, whatever the loss makes of it."),
    "correction_mean": ("Sampler correction, mean", "Mean weight of the correction for the sampler; 1 where it agrees."),
    "correction_dropped": ("Sampler correction, dropped", "Share of tokens that the sampler correction drops."),
    "off_policy_dropped": ("Off-policy tokens dropped", "Share of tokens in sequences that drifted too far from their sampler."),
    "selected_fraction": ("Selected tokens, fraction", "Share of tokens that the loss's step-wide rule keeps."),
    "reward_std": ("Reward, standard deviation", "Over the step's completions; 0 means that nothing distinguishes them."),
    "zero_std_fraction": ("Groups without a difference", "Share of groups whose completions all earn the same."),
    "completion_tokens_max": ("Longest completion, tokens", "Of the step."),
    "truncated_fraction": ("Truncated completions", "Share of completions that reached the limit before they ended."),
    "reward_errors": ("Reward errors", "Samples that a reward function failed on; they are left out."),
    "resampled_groups": ("Resampled groups", "Groups drawn again because the first ones taught nothing."),
    "uncorrected": ("Uncorrected completions", "Completions too long for a second turn."),
    "rejected_fraction": ("Rejected tokens, fraction", "Share of tokens in sequences that the loss rejects for their drift."),
    "teacher_divergence": ("Divergence from the teacher, nats a token", "What distillation lowers."),
    "kl_coef": ("KL coefficient", "Of the adaptive KL in this step."),
    "entropy_coef": ("Entropy coefficient", "Of the adaptive entropy bonus in this step."),
    "drawn_reward": ("Reward of all that was drawn", "With the groups that were not kept."),
    "drawn_zero_std_fraction": ("Drawn groups without a difference", "Share of all groups drawn, those not kept included."),
    "drawn_truncated_fraction": ("Drawn completions truncated", "Share of all completions drawn, those not kept included."),
    "tokens": ("Supervised tokens", "Tokens that the step trained."),
    "seconds": ("Seconds a step", "Wall clock of the step, the evaluation after it not included."),
    "seconds_rollout": ("Seconds of rollout", "Decoding, of the step."),
    "seconds_reward": ("Seconds of reward", "Grading, of the step, as far as decoding did not hide it."),
    "seconds_update": ("Seconds of update", "Scoring and the optimizer's updates, of the step."),
    "trained_tokens_per_second": ("Trained tokens a second", "Supervised tokens over the step's wall clock."),
    "drawn_tokens_per_second": ("Drawn tokens a second", "Completion tokens over the step's wall clock, trained or not."),
    "mfu": ("Model FLOPs utilisation", "Useful FLOPs of the update over what the device could do in that time."),
    "memory_peak_gib": ("Memory high-water, GiB", "The most that the device has held since the process started."),
    "eval_accuracy_low": ("Held-out accuracy, lower end", "Of its 95 % interval over problems (Wilson)."),
    "eval_accuracy_high": ("Held-out accuracy, upper end", "Of its 95 % interval over problems (Wilson)."),
    "eval_change": ("Change of held-out accuracy", "After training less before it."),
    "eval_change_low": ("Change of held-out accuracy, lower end", "Of its 95 % interval (Newcombe)."),
    "eval_change_high": ("Change of held-out accuracy, upper end", "Of its 95 % interval (Newcombe)."),
    "eval_accuracy_if_finished": ("Held-out accuracy of finished answers", "Of the completions that ended before the limit."),
    "eval_truncated_fraction": ("Held-out answers truncated", "Share of greedy answers that reached the limit."),
    "eval_problems": ("Held-out problems", "How many were answered."),
    "eval_ungraded": ("Held-out answers ungraded", "Answers that the grader failed on; their problems are left out."),
    "eval_tokens": ("Held-out tokens", "Of the rows that the held-out loss is a mean over."),
    "eval_completion_tokens": ("Held-out answers, tokens", "Mean tokens of a greedy answer."),
    "eval_accuracy_t1": ("Held-out accuracy, first turn", "Before the policy is shown its answer again."),
    "eval_accuracy_t2": ("Held-out accuracy, second turn", "After the policy was shown its answer again."),
    "eval_correction_gain": ("Second turn minus first", "What looking again changes in held-out accuracy."),
    "eval_incorrect_to_correct": ("Mended answers", "Share of problems that only the second turn answers right."),
    "eval_correct_to_incorrect": ("Spoilt answers", "Share of problems that only the first turn answers right."),
}  # fmt: skip


def title(metric: str) -> str:
    """What people call it; its own name where it has no other."""
    return METRICS[metric][0] if metric in METRICS else metric


def explain(metric: str) -> str:
    """A sentence on how to read it."""
    if metric in METRICS:
        return METRICS[metric][1]
    if metric.startswith("reward_"):
        spread = "Standard deviation over the step's completions of" if metric.endswith("_std") else "Mean of"
        return f"{spread} one reward function, before its weight."
    if metric.startswith("eval_avg_at_"):
        return "Held-out accuracy of sampled answers, averaged over several for each problem."
    return "Recorded by the loss itself, a reward or a hook; jaxreason attaches no meaning to it."
