"""One-line faults, put in one at a time: a test must fail for each. Not collected by pytest.

    python tests/mutants.py [--only PATTERN] [--jobs N] [--list]

Each mutation is applied in a copy of the tree, where the tests that are expected to notice it run with ``-x -q``. The same tests
first run once without any mutation: where they fail already, the mutation is ``broken`` and says nothing. A table says which
mutations survive (``SURVIVED``: no test failed) and which are ``stale`` (the old text is not in the file, or is there more than
once). Any of the three makes the exit status 1. ``--only`` is a shell pattern on ``FILE NOTE``, e.g. ``"*losses*"``.
"""

import argparse
import concurrent.futures
import fnmatch
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("jaxreason", "tests", "configs", "scripts", "examples", "benchmarks", "launch", "docs", "pyproject.toml", "README.md")
LIMIT_S = 900.0  # of one mutation's tests


class Mutant(NamedTuple):
    """``old``, which is in the file exactly once, becomes ``new``; ``tests`` are run: files, or files::names."""

    file: str
    old: str
    new: str
    tests: str
    note: str


class Outcome(NamedTuple):
    """What became of a mutant: killed, survived, stale, broken, or timeout (the tests hang: as good as killed)."""

    mutant: Mutant
    result: str
    seconds: float
    said: str


def pytest_in_copy(tests: str, mutant: Mutant | None) -> tuple[int | None, str]:
    """(exit status, None if it hung; the first failure) of ``tests`` in a copy of the tree with one mutant, or with none."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, tree / name)
        if mutant:
            path = tree / "jaxreason" / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        try:
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return None, f"no end after {LIMIT_S:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, lines[0] if lines else (done.stdout + done.stderr).strip().splitlines()[-1]


@functools.cache
def unmutated(tests: str) -> tuple[int | None, str]:
    """The same without a mutant, once for each set of tests."""
    return pytest_in_copy(tests, None)


def run(mutant: Mutant) -> Outcome:
    """Applies one mutant in a copy and runs its tests there, if they pass without it."""
    started = time.monotonic()
    count = (ROOT / "jaxreason" / mutant.file).read_text().count(mutant.old)
    if count != 1:
        return Outcome(mutant, "stale", 0.0, f"the old text is there {count} times")
    if (before := unmutated(mutant.tests))[0] != 0:
        return Outcome(mutant, "broken", time.monotonic() - started, f"without the mutant: {before[1]}")
    status, said = pytest_in_copy(mutant.tests, mutant)
    result = {None: "timeout", 0: "SURVIVED", 1: "killed"}.get(status, "broken")
    return Outcome(mutant, result, time.monotonic() - started, said)


def main() -> int:
    """Runs the chosen mutants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--list", action="store_true", help="run nothing: check that every old text is there, and list")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if fnmatch.fnmatch(f"{m.file} {m.note}", args.only)]
    if args.list:
        stale = [m for m in chosen if (ROOT / "jaxreason" / m.file).read_text().count(m.old) != 1]
        for mutant in chosen:
            print(f"{'stale  ' if mutant in stale else '       '}{mutant.file}: {mutant.note}  ->  {mutant.tests}")
        print(f"{len(chosen)} mutants, {len(stale)} stale")
        return 1 if stale else 0
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for outcome in pool.map(run, chosen):
            outcomes.append(outcome)
            mutant = outcome.mutant
            print(f"{outcome.result:9}{outcome.seconds:6.0f} s  {mutant.file}: {mutant.note}  [{outcome.said[:100]}]", flush=True)
    alive = [o for o in outcomes if o.result == "SURVIVED"]
    failed = alive + [o for o in outcomes if o.result in ("stale", "broken")]
    print(f"\n{len(outcomes)} mutants, {len(alive)} survived ({len(alive) / max(1, len(outcomes)):.0%}), "
          f"{len(failed) - len(alive)} stale or broken")  # fmt: skip
    for outcome in failed:
        print(f"  {outcome.result}: {outcome.mutant.file}: {outcome.mutant.note}")
    return 1 if failed else 0


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "losses/surrogate.py",
        "jnp.where(a > 0, jnp.exp(-x.log_w), w)",
        "w",
        "tests/test_losses_policy.py::test_hand_number",
        "variant: aspo does not turn the ratio over",
    ),
    Mutant(
        "losses/surrogate.py",
        "2.0 ** (-1.0 / half_life)",
        "1.0",
        "tests/test_losses_policy.py::test_hand_number",
        "variant: fipo discounts nothing",
    ),
    Mutant(
        "losses/sampler_correction.py",
        '"k1": -log_rho',
        '"k1": log_rho',
        "tests/test_losses_policy.py::test_twin",
        "variant: k1 bounds rho and not its reciprocal",
    ),
    Mutant(
        "losses/sampler_correction.py",
        "if kind in BY_SEQUENCE else",
        "if kind in () else",
        "tests/test_losses_policy.py::test_a_correction_is_normalized_over_the_step",
        "variant: products of sequences are averaged over tokens",
    ),
    Mutant(
        "losses/variants.py",
        "sequences.live & some & others",
        "sequences.live & some",
        "tests/test_losses_policy.py::test_rewards_as_labels_twin",
        "variant: real trains prompts with one side only",
    ),
    Mutant(
        "losses/by_token.py",
        "np.cumsum(values[::-1])[::-1]",
        "np.cumsum(values)",
        "tests/test_losses_advantage.py::test_process_supervision_by_hand",
        "variant: a step pays the tokens after it",
    ),
    Mutant(
        "losses/by_token.py",
        "apart @ energy",
        "apart @ np.ones_like(energy)",
        "tests/test_losses_advantage.py::test_twin_on_uneven_groups",
        "variant: otb weighs samples alike",
    ),
    Mutant(
        "losses/advantage.py",
        "rho - lost)",
        "rho)",
        "tests/test_losses_advantage.py::test_by_hand",
        "variant: a wrong answer earns what a right one does",
    ),
    Mutant(
        "losses/surrogate.py",
        'valley)(x.extras["step"])',
        'valley)(x.extras["step"] - 1)',
        "tests/test_expert.py::test_the_weight_of_the_data_rises_and_falls",
        "variant: chord's weight is a step late",
    ),
    Mutant(
        "rl/batch.py",
        "extras[STEP] = everywhere(step)",
        "extras[STEP] = everywhere(step - 1)",
        "tests/test_sampler.py::test_a_run_with_everything_of_ones_own_by_hand",
        "variant: steps are counted from 0",
    ),
    Mutant(
        "rl/grpo.py",
        'batches[0] = dataclasses.replace(batch, old_logp=tokens["logp"])',
        "pass",
        "tests/test_grpo_update.py::test_a_step_of_four_updates_over_two_minibatches_equals_the_twin",
        "the first minibatch forgets the policy that drew it",
    ),
    Mutant(
        "model/vocab.py",
        "a[1] * jnp.exp(a[0] - top) + b[1]",
        "a[1] + b[1]",
        "tests/test_vocab.py::test_one_pass_over_logits_finds_what_two_find",
        "head: what was added up does not shrink where a larger logit comes",
    ),
    Mutant(
        "rewards/values.py",
        'r"(?<!\\\\)[.,;:\\s]+$", "", bare',
        '"x" * 9, "", bare',
        "tests/test_rewards_answer.py::test_a_sentence_around_a_formula_may_end",
        "rewards: a formula's full stop is part of it",
    ),
    Mutant(
        "rl/grpo.py",
        "if number else batch\n",
        "if False else batch\n",
        "tests/test_grpo_update.py::test_a_rule_of_the_current_policy_is_evaluated_before_every_update",
        "variant: the rule of the current policy runs once",
    ),
    Mutant(
        "rl/grpo.py",
        'return loop.restore_more("reference", states.abstract_params(model, mesh, model.execution.compute_dtype))',
        "return None",
        "tests/test_loop.py::test_a_refreshed_reference_and_an_adaptive_kl_resume_bitwise",
        "variant: a resumed run forgets its refreshed reference",
    ),
    Mutant(
        "rl/batch.py",
        "s.drawn and s.reward > 0,",
        "s.drawn and s.reward < 0,",
        "tests/test_grpo_update.py::test_the_shares_of_right_answers_and_the_mean_of_the_correction_are_of_each_update",
        "variant: wrong answers are imitated",
    ),
    Mutant(
        "rl/collect.py",
        "greedy=greedy[c.prompt_index]",
        "greedy=0.0",
        "tests/test_advantages.py::test_every_prompt_is_also_completed_greedily_for_an_estimator_that_compares_with_it",
        "variant: remax without its baseline",
    ),
    Mutant(
        "train/sft.py",
        "step % every == 0",
        "step % every == 1",
        "tests/test_loop.py::test_proximal_sft_compares_with_a_model_that_follows_and_resumes_bitwise",
        "variant: the reference of psft moves a step late",
    ),
    Mutant(
        "rewards/language.py",
        "counts.get(script, 0) for script in _SCRIPTS[language]",
        "n for n in counts.values()",
        "tests/test_rewards_format_length.py",
        "variant: every language is the right one",
    ),
    Mutant(
        "losses/reduce.py",
        "weights = 1.0 / _at_least_one(totals.tokens)",
        "weights = 1.0 / _at_least_one(totals.sequences)",
        "tests/test_losses_policy.py tests/test_losses_identities.py",
        "token-mean divides by sequences",
    ),
    Mutant(
        "losses/reduce.py",
        "return jnp.where(sequences.live, weights, 0.0)",
        "return weights",
        "tests/test_losses_policy.py",
        "masked tokens get a weight",
    ),
    Mutant(
        "losses/reduce.py",
        "weights = 1.0 / (max_completion_tokens * count)",
        "weights = 1.0 / max_completion_tokens",
        "tests/test_losses_policy.py",
        "Dr.GRPO's constant without the sequences",
    ),
    Mutant(
        "losses/reduce.py",
        'totals.sequences if sequence_count == "trained"',
        'totals.sequences if sequence_count != "none"',
        "tests/test_losses_frameworks.py",
        "TRL's mean over the sequences that are trained only",
    ),
    Mutant(
        "losses/presets.py",
        'k3 = known["kl_estimator"].startswith("k3")',
        "k3 = True",
        "tests/test_losses_frameworks.py",
        "verl's clamps on every estimator",
    ),
    Mutant(
        "losses/kl.py",
        "weight, stop_gradient(weight))",
        "weight, weight)",
        "tests/test_losses_policy.py",
        "a clamped KL keeps the gradient of its ratio",
    ),
    Mutant(
        "losses/advantage.py",
        "jnp.where((high > low) & (n > ddof), std, 1.0)",
        "std",
        "tests/test_losses_advantage.py tests/test_losses_frameworks.py",
        "others that are equal are divided by eps",
    ),
    Mutant(
        "losses/kl.py",
        "d = ref_logp - logp",
        "d = logp - ref_logp",
        "tests/test_losses_policy.py",
        "the KL's log-ratio has the other sign",
    ),
    Mutant(
        "losses/kl.py",
        '"k2": lambda: 0.5 * xp.square(d)',
        '"k2": lambda: xp.square(d)',
        "tests/test_losses_policy.py",
        "k2 without its half",
    ),
    Mutant(
        "losses/kl.py",
        "result = weight * result",
        "result = 1.0 * result",
        "tests/test_losses_policy.py tests/test_losses_identities.py",
        "k3_unbiased without its ratio",
    ),
    Mutant(
        "losses/surrogate.py",
        "loss = -jnp.minimum(raw * a, jnp.clip(w, 1.0 - clip_low, 1.0 + clip_high) * a)",
        "loss = -jnp.maximum(raw * a, jnp.clip(w, 1.0 - clip_low, 1.0 + clip_high) * a)",
        "tests/test_losses_policy.py",
        "PPO takes the larger of both terms",
    ),
    Mutant(
        "losses/surrogate.py",
        "loss = jnp.where(a < 0, jnp.minimum(loss, -dual_clip * a), loss)",
        "loss = jnp.where(a > 0, jnp.minimum(loss, -dual_clip * a), loss)",
        "tests/test_losses_policy.py tests/test_losses_presets.py",
        "dual clip where the advantage is positive",
    ),
    Mutant(
        "losses/surrogate.py",
        "return Surrogate(-bounded * x.advantages * x.logp, low, w > ratio_max)",
        "return Surrogate(-bounded * x.advantages, low, w > ratio_max)",
        "tests/test_losses_policy.py tests/test_losses_identities.py",
        "CISPO without log pi",
    ),
    Mutant(
        "losses/ratio.py",
        "log_w = stop_gradient(sequence_mean(token, sequences)) + logp - stop_gradient(logp)",
        "log_w = sequence_mean(token, sequences) + logp - stop_gradient(logp)",
        "tests/test_losses_policy.py tests/test_losses_identities.py",
        "GSPO-token with the sequence's gradient",
    ),
    Mutant(
        "losses/ratio.py",
        "log_w = sequence_sum(token, sequences)",
        "log_w = sequence_mean(token, sequences)",
        "tests/test_losses_policy.py tests/test_losses_identities.py",
        "the trajectory's ratio as a mean",
    ),
    Mutant(
        "losses/sampler_correction.py",
        "log_rho = stop_gradient(old_logp - sampler_logp)",
        "log_rho = stop_gradient(sampler_logp - old_logp)",
        "tests/test_losses_policy.py",
        "the sampler's correction upside down",
    ),
    Mutant(
        "losses/sampler_correction.py",
        '"geo_rs": jnp.ones_like(rho)',
        '"geo_rs": judged',
        "tests/test_losses_policy.py",
        "geo_rs weights instead of rejecting",
    ),
    Mutant(
        "losses/advantage.py",
        "return jnp.where(valid & (high > low), values - _mean(values, valid, axis), 0.0)",
        "return jnp.where(high > low, values - _mean(values, valid, axis), 0.0)",
        "tests/test_losses_advantage.py",
        "a sample without a reward has an advantage",
    ),
    Mutant(
        "losses/advantage.py",
        "jnp.where(n > 1, n / jnp.maximum(n - 1.0, 1.0), 1.0)",
        "1.0",
        "tests/test_losses_advantage.py",
        "leave-one-out with itself",
    ),
    Mutant(
        "losses/advantage.py",
        "    spread = _std(_centred(values, valid, axis=None), valid, None, ddof, eps)",
        "    spread = _std(_centred(values, valid, axis=1), valid, None, ddof, eps)",
        "tests/test_losses_advantage.py",
        "LitePPO's spread within groups",
    ),
    Mutant(
        "losses/sft.py",
        "loss = loss * inputs.token_weights",
        "loss = loss * 1.0",
        "tests/test_losses_sft.py",
        "token weights of a supervised loss ignored",
    ),
    Mutant(
        "losses/sft.py",
        'counts = jnp.sqrt(counts) if reduce == "seq-sqrt" else counts',
        "counts = counts",
        "tests/test_losses_sft.py",
        "seq-sqrt is the plain mean",
    ),
    Mutant(
        "losses/sft.py",
        "else jnp.exp(a * logp)",
        "else jnp.exp(logp)",
        "tests/test_losses_sft.py",
        "the power of p ignored",
    ),
    Mutant(
        "train/optimizer.py",
        'path[-1].key not in ("scale", "bias", "magnitude")',
        'path[-1].key not in ("scale", "bias", "magnitude", "embedding", "head")',
        "tests/test_optimizer.py::test_weight_decay_reaches_every_matrix_and_no_norm",
        "embedding and head without weight decay",
    ),
    Mutant(
        "train/optimizer.py",
        "(lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16",
        "(lax.bitcast_convert_type(x, jnp.uint32) + 0x7FFF) >> 16",
        "tests/test_optimizer.py::test_rounding_has_the_right_mean",
        "stored bfloat16 rounded to nearest",
    ),
    Mutant(
        "train/optimizer.py",
        "return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))",
        "return rounded",
        "tests/test_optimizer.py::test_what_bfloat16_holds_stays",
        "rounding carries through a NaN",
    ),
    Mutant(
        "train/optimizer.py",
        "jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), kind), count)",
        "jax.random.fold_in(jax.random.key(seed), kind)",
        "tests/test_optimizer.py::test_draws_are_of_seed_update_and_leaf_alone",
        "every update rounds with the same bits",
    ),
    Mutant(
        "train/optimizer.py",
        "jnp.where(k < warmup, (k + 1.0) / max(1, warmup), shape)",
        "jnp.where(k < warmup, k / max(1, warmup), shape)",
        "tests/test_step.py::test_schedules_by_hand",
        "the first update has rate 0",
    ),
    Mutant(
        "train/optimizer.py",
        "shape = 1.0 - x * (1.0 - final)",
        "shape = 1.0 - x",
        "tests/test_optimizer.py::test_the_linear_schedule_ends_at_its_fraction",
        "the linear schedule ends at 0",
    ),
    Mutant(
        "data/batches.py",
        "token_weights[r, at:answer], token_weights[r, answer:end] = of_thought, of_answer",
        "token_weights[r, answer:end], token_weights[r, at:answer] = of_thought, of_answer",
        "tests/test_pipeline.py",
        "weights of thought and answer swapped",
    ),
    Mutant(
        "data/batches.py",
        "answer = min(at + piece.answer - 1, end)",
        "answer = min(at + piece.answer, end)",
        "tests/test_pipeline.py",
        "the thought's boundary one token late",
    ),
    Mutant(
        "data/encode.py",
        "answers.append(max(len(prompt) + thoughts[at], 1))",
        "answers.append(max(len(prompt) + thoughts[at] - 1, 1))",
        "tests/test_pipeline.py",
        "the thought ends one token early",
    ),
    Mutant(
        "data/batches.py",
        "mask[r, at + piece.start - 1 : end - 1] = 1",
        "mask[r, at + piece.start : end - 1] = 1",
        "tests/test_pipeline.py tests/test_pack.py",
        "the first trained token left out",
    ),
    Mutant(
        "data/batches.py",
        "positions[r, at:end] = np.arange(len(piece.ids))",
        "positions[r, at:end] = np.arange(at, end)",
        "tests/test_pipeline.py tests/test_pack.py",
        "positions go on through a packed row",
    ),
    Mutant(
        "data/pack.py",
        "random = np.random.default_rng([seed, epoch])",
        "random = np.random.default_rng([seed, 0])",
        "tests/test_pack.py tests/test_pipeline.py",
        "the same order of rows every epoch",
    ),
    Mutant(
        "data/pack.py",
        "if free > length and len(rows[row]) < MAX_EXAMPLES:",
        "if free > length:",
        "tests/test_pack.py",
        "rows of any number of examples",
    ),
    Mutant(
        "data/prompts.py",
        "order[np.random.default_rng([self._seed, epoch]).permutation(len(order))]",
        "order[np.random.default_rng([self._seed, 0]).permutation(len(order))]",
        "tests/test_pipeline.py",
        "the same order of prompts every epoch",
    ),
    Mutant(
        "data/stream.py",
        "return held.example if (placed.shard, placed.at.chunk) == (held.shard, held.chunk) else 0",
        "return 0",
        "tests/test_stream.py::test_a_pass_has_every_row_once_and_no_held_out_one",
        "held-out rows of the chunk that is partly held out are trained",
    ),
    Mutant(
        "data/stream.py",
        "begin.example if placed.at[:3] == begin[:3] else 0",
        "0",
        "tests/test_stream.py::test_a_stream_goes_on_bitwise_from_any_step",
        "a stream goes on from the beginning of the chunk",
    ),
    Mutant(
        "data/stream.py",
        "shuffle=data.shuffle, seed=self._seed, epoch=number",
        "shuffle=data.shuffle, seed=self._seed, epoch=0",
        "tests/test_stream.py::test_each_block_has_an_order_of_its_own",
        "every block of a stream is shuffled alike",
    ),
    Mutant(
        "data/remote.py",
        "left = self._at if self._in_order else 0",
        "left = 0",
        "tests/test_stream.py::test_a_broken_connection_is_opened_again_where_it_was",
        "a connection that is opened again begins at the first byte",
    ),
    Mutant(
        "data/mixture.py",
        "np.arange(epoch * count, (epoch + 1) * count)",
        "np.arange(count)",
        "tests/test_mixture.py",
        "the same share of a source every epoch",
    ),
    Mutant(
        "data/mixture.py",
        "first = int(self.firsts[at])",
        "first = 0",
        "tests/test_mixture.py",
        "the second store's tokens are read at the places of both",
    ),
    Mutant(
        "data/batches.py",
        "self._shares.epoch(epoch)",
        "self._shares.epoch(0)",
        "tests/test_mixture.py",
        "SFT trains the first epoch's share in every epoch",
    ),
    Mutant(
        "data/prompts.py",
        "order = self._shares.epoch(epoch)",
        "order = self._shares.epoch(0)",
        "tests/test_mixture.py",
        "GRPO draws from the first epoch's share in every epoch",
    ),
    Mutant(
        "data/pipeline.py",
        "ends = np.searchsorted(train.index, np.cumsum([len(store.starts) for store in stores]))",
        "ends = np.cumsum([len(store.starts) for store in stores])",
        "tests/test_mixture.py",
        "a source's share counts its held-out rows",
    ),
    Mutant(
        "data/prompts.py",
        "if epoch != self._epoch:",
        "if True:",
        "tests/test_pipeline.py",
        "the prompts' order drawn for every prompt",
    ),
    Mutant(
        "data/pipeline.py",
        'state.update(store.meta["content"].encode())',
        'state.update(b"")',
        "tests/test_pipeline.py",
        "the data's fingerprint without its tokens",
    ),
    Mutant(
        "data/files.py",
        ", s.st_mtime_ns, s.st_ctime_ns]",
        ", s.st_mtime_ns]",
        "tests/test_pipeline.py",
        "a rewritten file of the same size and time is not noticed",
    ),
    Mutant(
        "data/pipeline.py",
        "if shared := parts(source, split) & trained:",
        "if shared := frozenset[str]():",
        "tests/test_pipeline.py",
        "trained rows as held-out rows",
    ),
    Mutant(
        "data/encode.py",
        "return completion[: at + 1]",
        "return completion[:at]",
        "tests/test_encode.py",
        "the stop token is not trained",
    ),
    Mutant(
        "data/pipeline.py",
        "chosen[np.random.default_rng([seed, _EVAL_STREAM]).permutation(count)[: data.eval_rows]] = True",
        "chosen[: data.eval_rows] = True",
        "tests/test_pipeline.py",
        "held-out rows are the first ones",
    ),
    Mutant(
        "data/schema.py",
        '*(_thought(turn) if role == "assistant" else ())',
        "*()",
        "tests/test_rows.py",
        "the thought in a field of a message is lost",
    ),
    Mutant(
        "data/example.py",
        "if opening in think + answer or closing in answer:",
        "if False:",
        "tests/test_rows.py",
        "nested think tags are rewritten",
    ),
    Mutant(
        "data/files.py",
        "else len(names) > 1) else []",
        "else False) else []",
        "tests/test_files.py",
        "a pattern mixes splits",
    ),
    Mutant(
        "rewards/values.py",
        " and closeness.any_close(golds, answers)",
        "",
        "tests/test_answers_table.py",
        "numbers that differ after six places are the same",
    ),
    Mutant(
        "rewards/pool.py",
        "terms = [weight * value for",
        "terms = [value for",
        "tests/test_rewards_pool.py",
        "reward weights ignored",
    ),
    Mutant(
        "rewards/pool.py",
        "total = [None if i in failed else self._total(row)",
        "total = [self._total(row)",
        "tests/test_rewards_pool.py",
        "a sample whose grader failed has a total",
    ),
    Mutant(
        "rewards/answer.py",
        'if multiple_boxed == "wrong" and not all(',
        'if multiple_boxed == "last" and not all(',
        "tests/test_rewards_answer.py",
        "several answers are right if the last is",
    ),
    Mutant(
        "rewards/length.py",
        "over = sample.completion_tokens - (limit - cache_tokens)",
        "over = sample.completion_tokens - limit",
        "tests/test_rewards_format_length.py",
        "the overlong penalty begins at the limit",
    ),
    Mutant(
        "rewards/length.py",
        "distinct = len({tuple(words[i : i + ngram_size]) for i in range(total)})",
        "distinct = len({tuple(words[i : i + 1]) for i in range(total)})",
        "tests/test_rewards_format_length.py",
        "repetition counts words",
    ),
    Mutant(
        "rewards/format.py",
        "if sample.truncated or tuple(",
        "if tuple(",
        "tests/test_rewards_format_length.py",
        "a truncated turn has a format",
    ),
    Mutant(
        "model/rope.py",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
        "tests/test_model.py",
        "rotation the other way",
    ),
    Mutant(
        "model/rope.py",
        "scaled = np.where(wavelength > low, frequencies / scaling.factor, frequencies)",
        "scaled = np.where(wavelength > low, frequencies, frequencies)",
        "tests/test_model.py",
        "low frequencies are not rescaled",
    ),
    Mutant(
        "model/blocks.py",
        "jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.arch.norm_eps)",
        "jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-2)",
        "tests/test_model.py",
        "the norm's epsilon ignored",
    ),
    Mutant(
        "model/blocks.py",
        "(nn.silu(gate) * up)",
        "(nn.gelu(gate) * up)",
        "tests/test_model.py",
        "gelu for silu",
    ),
    Mutant(
        "checkpoint.py",
        "        (step_dir / MANIFEST).unlink()\n",
        "",
        "tests/test_checkpoint.py::test_a_deletion_cut_short_leaves_no_finished_step",
        "an old manifest is not deleted first",
    ),
    Mutant(
        "checkpoint.py",
        'if entry["sha256"] != listed[name]["sha256"]:',
        "if False:",
        "tests/test_checkpoint.py",
        "the content of a checkpoint is not verified",
    ),
    Mutant(
        "checkpoint.py",
        "for old in steps(self.directory)[: -self.keep]:",
        "for old in steps(self.directory)[:0]:",
        "tests/test_checkpoint.py",
        "old checkpoints are kept",
    ),
    Mutant(
        "sampler/sampling.py",
        "for number in (step, prompt, sample):",
        "for number in (prompt, sample):",
        "tests/test_sampling.py tests/test_rollout.py",
        "every step draws the same noise",
    ),
    Mutant(
        "sampler/sampling.py",
        "return tokens, chosen - jnp.log(jnp.sum(kept, axis=-1)), chosen - log_total",
        "return tokens, chosen - log_total, chosen - log_total",
        "tests/test_sampling.py tests/test_rollout.py",
        "the sampler's log-probs are untruncated",
    ),
    Mutant(
        "sampler/sampling.py",
        "scaled = logits if greedy else logits / sampling.temperature",
        "scaled = logits",
        "tests/test_sampling.py",
        "the temperature ignored in drawing",
    ),
    Mutant(
        "sampler/sampling.py",
        "weights = jnp.where(weights >= floor, weights, 0.0)\n    return",
        "weights = weights\n    return",
        "tests/test_sampling.py",
        "top_p cuts nothing",
    ),
    Mutant(
        "config/run.py",
        '        "train.save_every",\n',
        "",
        "tests/test_loop.py",
        "save_every may not change on resume",
    ),
    Mutant(
        "config/grpo.py",
        "if self.updates_per_rollout % self.minibatches:",
        "if False:",
        "tests/test_runs.py::test_wrong_input_is_one_message",
        "unequal passes over minibatches",
    ),
    Mutant(
        "config/schema.py",
        "Seed = Annotated[int, Field(ge=0, lt=2**32)]",
        "Seed = Annotated[int, Field(ge=0)]",
        "tests/test_config.py",
        "seeds of any size",
    ),
    Mutant(
        "hf/write.py",
        "if target.exists() and not (target.is_dir() and not any(target.iterdir())):",
        "if False:",
        "tests/test_hf.py",
        "an export overwrites a directory",
    ),
    Mutant(
        "rl/grpo.py",
        "batch = batches[number % len(batches)]",
        "batch = batches[0]",
        "tests/test_grpo_update.py",
        "only minibatch 0 is trained",
    ),
    Mutant(
        "train/loop.py",
        "return self.total * self.updates",
        "return self.total",
        "tests/test_sampler.py",
        "the schedule is not multiplied by the updates of a rollout",
    ),
    Mutant(
        "rl/grpo.py",
        "schedule, shapes.microbatches, config.rollout.temperature,",
        "schedule, shapes.microbatches, 1.0,",
        "tests/test_grpo_update.py",
        "the learner ignores rollout.temperature",
    ),
    Mutant(
        "rl/batch.py",
        "return sequence.trained and not (mask_truncated and sequence.completion.truncated)",
        "return sequence.trained",
        "tests/test_grpo_update.py",
        "train.truncated=mask does nothing",
    ),
    Mutant(
        "rl/sequence.py",
        "(self.kept and not math.isnan(self.reward))",
        "not math.isnan(self.reward)",
        "tests/test_grpo_update.py",
        "corrections that are only measured are trained",
    ),
    Mutant(
        "evaluate/accuracy.py",
        "completion.tokens if completion.truncated else completion.tokens[:-1]",
        "completion.tokens[:-1]",
        "tests/test_sampler.py",
        "a truncated completion loses its last token before grading",
    ),
    Mutant(
        "rl/collect.py",
        "draw=step * ROUNDS + attempt",
        "draw=attempt",
        "tests/test_sampler.py",
        "every step's rollout draws the same noise",
    ),
    Mutant(
        "rl/advantages.py",
        "value + config.teacher.coef * (s.teacher_logp - s.completion.policy_logp)",
        "value + (s.teacher_logp - s.completion.policy_logp)",
        "tests/test_config_keys.py::test_changing_a_key_changes_something[grpo-teacher.coef]",
        "teacher.coef ignored",
    ),
    Mutant(
        "rl/grpo.py",
        "make_score(model, shapes.microbatches, temperature)",
        "make_score(model, shapes.microbatches, 1.0)",
        "tests/test_grpo_update.py",
        "log-probs of the old policy and of the reference ignore rollout.temperature",
    ),
    Mutant(
        "rl/batch.py",
        "    return np.arange(count) if parts == 1 else",
        "    return np.arange(count) if parts else",
        "tests/test_grpo_update.py",
        "minibatches are taken in the order of drawing",
    ),
    Mutant(
        "rl/batch.py",
        "sampler_logp=self.field(lambda s: s.completion.behaviour_logp)",
        "sampler_logp=self.field(lambda s: s.completion.policy_logp)",
        "tests/test_sampler.py",
        "sampler_logp is not of the distribution that was sampled",
    ),
    Mutant(
        "rl/batch.py",
        "old = {OLD_ENTROPY: stats.entropy}",
        "old = {OLD_ENTROPY: stats.logp}",
        "tests/test_sampler.py",
        "old_entropy holds something else",
    ),
    Mutant(
        "rl/batch.py",
        'ints["sequence_ids"][row, whole], ints["group_ids"][row, whole] = number, s.group',
        'ints["sequence_ids"][row, whole], ints["group_ids"][row, whole] = number // 2, s.group',
        "tests/test_grpo_update.py",
        "two sequences share an id",
    ),
    Mutant(
        "rl/advantages.py",
        "return sequence.reward - beta * float",
        "return sequence.reward + beta * float",
        "tests/test_advantages.py",
        "a KL in the reward is a bonus",
    ),
    Mutant(
        "rl/advantages.py",
        'kl.value(config.kl.estimator or "k1",',
        'kl.value("k1",',
        "tests/test_grpo_update.py",
        "kl.estimator is ignored with KL in the reward",
    ),
    Mutant(
        "rl/advantages.py",
        "[_finite(_total(s, config, objective) - _total(one, config, objective)) for s in group]",
        "[_finite(s.reward - one.reward) for s in group]",
        "tests/test_grpo_update.py",
        "KL in the reward is left out of corrections compared with the first answer",
    ),
    Mutant(
        "rl/collect.py",
        "fits = [i for i, prompt in enumerate(again) if len(prompt.ids) <= self.longest_prompt]",
        "fits = [i for i, prompt in enumerate(again) if True]",
        "tests/test_loop.py",
        "corrections that are too long are drawn",
    ),
    Mutant(
        "rl/shapes.py",
        'return bool(config.kl.coef) or "ref_logp" in loss.needs',
        "return bool(config.kl.coef)",
        "tests/test_sampler.py",
        "a loss that reads ref_logp gets none without kl.coef",
    ),
    Mutant(
        "rl/sequence.py",
        "flat = [np.ptp(g) == 0 for g in graded if len(g)]",
        "flat = [np.ptp(g) > 0 for g in graded if len(g)]",
        "tests/test_grpo.py",
        "zero_std_fraction counts the others",
    ),
    Mutant(
        "train/loop.py",
        "        self.note(self._log.write, step, record)\n",
        "",
        "tests/test_loop.py",
        "a step leaves no line",
    ),
    Mutant(
        "train/loop.py",
        'self._counters |= saved["counters"]',
        "pass",
        "tests/test_loop.py",
        "a resumed summary counts what ran since the last start",
    ),
    Mutant(
        "train/loop.py",
        "and math.isinf(value))",
        "and False)",
        "tests/test_loop.py::test_a_step_that_trained_nothing_says_zero",
        "a minimum over nothing is infinite",
    ),
    Mutant(
        "train/loop.py",
        "if self._start == 0 and self._evaluate_first and (found := self._measured(state)):",
        "if False:",
        "tests/test_loop.py",
        "nothing is measured before the first step",
    ),
    Mutant(
        "train/folder.py",
        "keep_lines(self.path / name, -1 if step is None else step)",
        "keep_lines(self.path / name, 0 if step is None else step)",
        "tests/test_loop.py",
        "a start without a checkpoint keeps the line of step 0",
    ),
    Mutant(
        "train/setup.py",
        "if not source.path.exists() or source.digest() != digest:",
        "if not source.path.exists():",
        "tests/test_loop.py::test_the_reference_stays_what_the_run_started_from",
        "weights that were trained again pass for those of the start",
    ),
    Mutant(
        "train/setup.py",
        "        return WeightSource.at(resolved.weights)\n    own =",
        "        return locate(weights)\n    own =",
        "tests/test_loop.py::test_the_reference_stays_what_the_run_started_from",
        "a resumed run looks its weights up again",
    ),
    Mutant(
        "train/state.py",
        "node = parts[any(fnmatch.fnmatchcase(names[path], pattern) for pattern in freeze)]",
        "node = parts[0]",
        "tests/test_loop.py",
        "train.freeze freezes nothing",
    ),
    Mutant(
        "checkpoint.py",
        "return _held(state) if model.adapter else state.model_params",
        "return state.params",
        "tests/test_loop.py",
        "a checkpoint lacks what does not train",
    ),
    Mutant(
        "sampler/engine/sampler.py",
        "on_tokens, progress, self._step, job.first_prompt",
        "on_tokens, progress, None, job.first_prompt",
        "tests/test_sampler.py",
        "the engine's completions name no step",
    ),
    Mutant(
        "train/folder.py",
        "elif self.resolved.data not in (None, resolved.data):",
        "elif False:",
        "tests/test_loop.py::test_a_run_whose_data_changed_is_refused",
        "a run goes on with other data",
    ),
    Mutant(
        "plan/timing.py",
        "elif user.kind in _SLICES and user.operands[0] == name:",
        "elif False:",
        "tests/test_plan_timing.py",
        "a fusion reads all of an array that it slices",
    ),
    Mutant(
        "plan/timing.py",
        "max(best, moved / (target.memory_bytes_per_s * rates.product_bandwidth))",
        "best",
        "tests/test_plan_timing.py",
        "a product never waits for its operands",
    ),
    Mutant(
        "plan/timing.py",
        "one.times * (seconds + target.rates.kernel_seconds)",
        "seconds + target.rates.kernel_seconds",
        "tests/test_plan_timing.py",
        "loops run once",
    ),
    Mutant(
        "sampler/engine/slots.py",
        "free // one",
        "room.limit_bytes // one",
        "tests/test_slots.py",
        "slots as if nothing else were on the device",
    ),
    Mutant(
        "train/offload.py",
        "with_memory_kind(_HOST)",
        'with_memory_kind("device")',
        "tests/test_slots.py tests/test_grpo.py::test_an_offloaded_model_lives_on_the_host_and_is_lent_to_the_devices",
        "what is offloaded stays on the devices",
    ),
    Mutant(
        "rl/batch.py",
        "source[row, answer] = whole.start + len(prompt) - 1 +",
        "source[row, answer] = whole.start + len(prompt) +",
        "tests/test_distillation.py::test_what_the_teacher_reads_by_hand",
        "distillation: the teacher's position is one too far",
    ),
    Mutant(
        "rl/batch.py",
        "[s.room for s in sequences]",
        "[s.length for s in sequences]",
        "tests/test_distillation.py::test_what_the_teacher_reads_by_hand",
        "distillation: no room for the teacher's prompts",
    ),
    Mutant(
        "train/step.py",
        "divergence * batch.teacher.taught",
        "divergence",
        "tests/test_distillation.py::test_the_step_equals_full_logits_however_it_is_packed_and_split",
        "distillation: sequences without a context are distilled",
    ),
    Mutant(
        "train/step.py",
        "dense_stats(logits / temperature, targets)",
        "dense_stats(logits, targets)",
        "tests/test_distillation.py::test_a_task_reward_and_a_teacher_add",
        "distillation: log-probs at temperature 1",
    ),
    Mutant(
        "train/step.py",
        "config, params = second[0], lax.stop_gradient(second[1])",
        "config, params = second",
        "tests/test_distillation.py::test_the_policy_as_its_own_teacher_is_a_copy_of_it_without_a_gradient",
        "distillation: a gradient through the teacher",
    ),
    Mutant(
        "rl/collect.py",
        "metrics_of([s for s in sequences if s.drawn],",
        "metrics_of(sequences,",
        "tests/test_distillation.py::test_the_starting_weights_told_the_answer_teach_and_their_own_answers_are_mixed_in",
        "distillation: rows' answers are in the rollout's metrics",
    ),
    Mutant(
        "rl/batch.py",
        "jnp.where(unknown > 0, stats.logp, drawn)",
        "drawn",
        "tests/test_distillation.py::test_the_starting_weights_told_the_answer_teach_and_their_own_answers_are_mixed_in",
        "distillation: rows' answers have a gap to the sampler",
    ),
    Mutant(
        "rl/context.py",
        "if s is not sequence and s.drawn",
        "if s.drawn",
        "tests/test_distillation.py::test_contexts",
        "distillation: a completion is its own peer",
    ),
    Mutant(
        "rl/context.py",
        " if len(ids) <= len(sequence.prompt.ids) + self.max_more else ()",
        "",
        "tests/test_distillation.py::test_a_teachers_prompt_holds_the_question_and_what_it_is_told",
        "distillation: the teacher's prompt has no limit",
    ),
    Mutant(
        "losses/distill.py",
        "jnp.log(-jnp.expm1(inside))",
        "jnp.log(inside + 2.0)",
        "tests/test_losses_identities.py::test_the_likeliest_tokens_and_the_rest_by_hand",
        "distillation: the tail is not what is left",
    ),
    Mutant(
        "losses/distill.py",
        ".at[..., 0].set(False)",
        "",
        "tests/test_losses_identities.py::test_adaptive_kl_by_hand",
        "distillation: the head may be empty",
    ),
    Mutant(
        "command.py",
        "        except OSError as error:\n",
        "        except MemoryError as error:\n",
        "tests/faults/test_refused.py::test_a_refusal_is_one_line_with_the_path_and_a_fix",
        "fault: a refusal of the system is a traceback",
    ),
    Mutant(
        "distributed.py",
        "elif isinstance(error, OSError):",
        "elif isinstance(error, MemoryError):",
        "tests/faults/test_refused.py::test_a_process_of_several_says_it_too",
        "fault: a refusal of the system is a traceback of one of several",
    ),
    Mutant(
        "train/loop.py",
        "            self._interrupt.requested = True\n",
        "",
        "tests/faults/test_refused.py::test_a_step_whose_line_cannot_be_written_is_saved",
        "fault: a full disk loses the step",
    ),
    Mutant(
        "data/store.py",
        "if len(found) != count * size:",
        "if False:",
        "tests/faults/test_refused.py::test_a_token_file_that_was_cut_is_named",
        "fault: a cut token file gives fewer tokens",
    ),
    Mutant(
        "paths.py",
        "    if (found := protocol(given)) is not None:",
        "    if (found := protocol(given)) is not None and False:",
        "tests/faults/test_refused.py -k object_store",
        "fault: an object store is a directory named gs:",
    ),
    Mutant(
        "paths.py",
        "        return Path(text).expanduser()\n",
        "        return Path(text)\n",
        "tests/faults/test_refused.py -k home",
        "fault: home is a directory named ~",
    ),
    Mutant(
        "train/optimizer.py",
        "return now if isinstance(now, optax.ScaleByScheduleState) else jnp.where(usable, now, was)",
        "return jnp.where(usable, now.count, was.count) if isinstance(now, optax.ScaleByScheduleState) else now",
        "tests/faults/test_not_finite.py -k bit_for",
        "fault: a skipped update moves the weights",
    ),
    Mutant(
        "train/step.py",
        "        if skips:\n",
        "        if True:\n",
        "tests/faults/test_not_finite.py -k program_is",
        "fault: the default step asks what is finite",
    ),
    Mutant(
        "train/loop.py",
        "or self._spoilt is not None or bool(",
        "or bool(",
        "tests/faults/test_not_finite.py -k a_bound",
        "fault: the state before the bad step is not kept",
    ),
    Mutant(
        "train/loop.py",
        "        self._counters[\"skipped_updates\"] += 1\n",
        "        self._counters[\"skipped_updates\"] = 1\n",
        "tests/faults/test_not_finite.py -k a_bound",
        "fault: skipped updates are not added up",
    ),
    Mutant(
        "replay.py",
        "jnp.arange(len(x))[:, None] == row, x,",
        "jnp.arange(len(x))[:, None] >= 0, x,",
        "tests/faults/test_not_finite.py -k a_bound",
        "fault: every row is said to be the bad one",
    ),
    Mutant(
        "train/not_finite.py",
        "        section, dot, rest = name.partition(\".\")",
        "        section, dot, rest = name.rpartition(\".\")",
        "tests/faults/test_not_finite.py -k comes_back",
        "fault: a kept batch loses a field",
    ),
    Mutant(
        "cli.py",
        "return None if args.dry_run else STOPPED",
        "return None",
        "tests/test_runs.py -k exits_75",
        "fault: a stopped run looks done",
    ),
    Mutant(
        "train/sinks.py",
        "            package.start_run(run_id=path.read_text().strip())",
        "            package.start_run(run_name=path.read_text().strip())",
        "tests/test_sinks.py -k mlflow",
        "fault: a resumed run is a second one of MLflow",
    ),
    Mutant(
        "config/parse.py",
        "    _check_depth(values, where)\n",
        "",
        "tests/faults/test_faults.py -k deep",
        "fault: a deep value is a traceback",
    ),
    Mutant(
        "../launch/slurm.sbatch",
        "if [ \"$status\" -eq 75 ]",
        "if [ \"$status\" -eq 2 ]",
        "tests/test_launch.py -k told_to_stop",
        "fault: Slurm ends a job that was told to stop",
    ),
    Mutant(
        "../launch/slurm.sbatch",
        "trap : TERM ",
        "# ",
        "tests/test_launch.py -k told_to_stop",
        "fault: the batch script ends before its processes",
    ),
    Mutant(
        "../launch/jobset.yaml",
        "values: [75, 143]",
        "values: [143]",
        "tests/test_launch.py -k jobset",
        "fault: a stopped pod is a failed one",
    ),
    Mutant(
        "evaluate/estimates.py",
        "worth = min(max(worth, count), max(most, count))",
        "worth = max(most, count)",
        "tests/test_evaluate_estimates.py",
        "evaluation: an interval of samples that all agree is that of many answers",
    ),
    Mutant(
        "evaluate/estimates.py",
        "if np.ptp(difference) == 0:",
        "if False:",
        "tests/test_evaluate_estimates.py",
        "evaluation: a difference that is everywhere the same is certain",
    ),
    Mutant(
        "evaluate/estimates.py",
        "values.append(float(np.mean(scores)) if scores else 0.0)",
        "values.append(float(np.max(scores)) if scores else 0.0)",
        "tests/test_evaluate_estimates.py",
        "evaluation: a tie of votes counts as its best answer",
    ),
    Mutant(
        "evaluate/estimates.py",
        "missed *= np.maximum(wrong - i, 0) / (n - i)",
        "missed *= wrong / n",
        "tests/test_evaluate_estimates.py",
        "evaluation: pass@k draws with replacement",
    ),
    Mutant(
        "evaluate/tasks/parse.py",
        "or _ALSO.match(rest)",
        "",
        "tests/test_evaluate_parse.py",
        "evaluation: 'A or B' is A",
    ),
    Mutant(
        "evaluate/tasks/parse.py",
        "or _ANOTHER.match(text, match.end())",
        "",
        "tests/test_evaluate_parse.py",
        "evaluation: '3 or 4' is 3",
    ),
    Mutant(
        "evaluate/tasks/parse.py",
        "rest = span[leads[-1].end() :].lstrip()",
        "rest = span[leads[0].end() :].lstrip()",
        "tests/test_evaluate_parse.py",
        "evaluation: the first stated answer counts, not the last",
    ),
    Mutant(
        "evaluate/tasks/parse.py",
        "return found[0] if found and all(answer == found[0] for answer in found) else None",
        "return found[-1] if found else None",
        "tests/test_evaluate_parse.py",
        "evaluation: several boxes: the last one counts",
    ),
    Mutant(
        "evaluate/tasks/load.py",
        "if shot.question not in asked and len(shown) < count:",
        "if len(shown) < count:",
        "tests/test_evaluate_tasks.py",
        "evaluation: a problem is shown as its own example",
    ),
    Mutant(
        "evaluate/tasks/load.py",
        "groups.setdefault(shot.group, [])",
        "groups.setdefault(None, [])",
        "tests/test_evaluate_tasks.py",
        "evaluation: examples of another subject are shown",
    ),
    Mutant(
        "evaluate/tasks/choice.py",
        'choices.sort(key=lambda choice: hashlib.sha256(f"{question}\\n{choice}".encode()).digest())',
        "pass",
        "tests/test_evaluate_tasks.py",
        "evaluation: GPQA's right choice is always A",
    ),
    Mutant(
        "evaluate/exam.py",
        "return None if span is None else family.parse(span, problem)",
        "return family.parse(sample.completion, problem)",
        "tests/test_evaluate_tasks.py",
        "evaluation: an answer inside the thought counts",
    ),
    Mutant(
        "evaluate/ask.py",
        "number * _KINDS + kind",
        "0",
        "tests/test_evaluate_strategies.py",
        "evaluation: every round of a search draws the same noise",
    ),
    Mutant(
        "evaluate/ask.py",
        "outcomes[index].drawn += sum(reply.drawn for reply in mine)",
        "outcomes[index].drawn += mine[0].drawn",
        "tests/test_evaluate_strategies.py",
        "evaluation: a strategy's cost is that of one sample",
    ),
    Mutant(
        "evaluate/strategies/tree.py",
        "if state.key in seen:",
        "if False:",
        "tests/test_evaluate_strategies.py",
        "evaluation: a level keeps a state twice",
    ),
    Mutant(
        "evaluate/strategies/tree.py",
        "stack += reversed(tried)",
        "stack += tried",
        "tests/test_evaluate_strategies.py",
        "evaluation: depth first tries the worst child first",
    ),
    Mutant(
        "evaluate/strategies/tree.py",
        "if state.key not in self._cache:",
        "if True:",
        "tests/test_evaluate_strategies.py",
        "evaluation: a state is judged again and again",
    ),
    Mutant(
        "evaluate/strategies/tree.py",
        'node.fate = "dropped" if (node.value or 0.0) >= prune else "pruned"',
        'node.fate = "dropped"',
        "tests/test_evaluate_strategies.py",
        "evaluation: what is below prune is not given up",
    ),
    Mutant(
        "evaluate/strategies/tree.py",
        "if node.state.key in expanded:",
        "if False:",
        "tests/test_evaluate_strategies.py",
        "evaluation: depth first tries a state by every way to it",
    ),
    Mutant(
        "evaluate/strategies/spaces.py",
        "if result != Fraction(match[4]):",
        "if False:",
        "tests/test_evaluate_strategies.py",
        "evaluation: a step with a wrong result is taken",
    ),
    Mutant(
        "evaluate/strategies/budget.py",
        "if spent < min_tokens and waited < waits and ended:",
        "if spent < min_tokens and ended:",
        "tests/test_evaluate_strategies.py",
        "evaluation: a thought is made to wait for ever",
    ),
    Mutant(
        "evaluate/strategies/budget.py",
        "begun += reply.tokens[: max_tokens - spent]",
        "begun += reply.tokens",
        "tests/test_evaluate_strategies.py",
        "evaluation: a thought's budget is exceeded",
    ),
    Mutant(
        "evaluate/strategies/sampled.py",
        "best = answers.index(won[0]) if won else 0",
        "best = 0",
        "tests/test_evaluate_strategies.py",
        "evaluation: self-consistency takes the first draw",
    ),
    Mutant(
        "evaluate/records.py",
        "if len(whole) < len(written):",
        "if False:",
        "tests/test_evaluate_run.py",
        "evaluation: a line that was cut off stays in the records",
    ),
    Mutant(
        "evaluate/run.py",
        "for item in items], first, drawn)",
        "for item in items], 0, drawn)",
        "tests/test_evaluate_run.py",
        "evaluation: a resumed evaluation draws other noise",
    ),
    Mutant(
        "evaluate/run.py",
        '"sampling": dataclasses.asdict(way.sampling), ',
        "",
        "tests/test_evaluate_run.py",
        "evaluation: answers at another temperature are taken for this one's",
    ),
    Mutant(
        "evaluate/run.py",
        "a.answer is not None and not a.truncated for a",
        "a.answer is not None for a",
        "tests/test_evaluate_run.py",
        "evaluation: what was cut off counts as a formatted answer",
    ),
    Mutant(
        "evaluate/run.py",
        "outcome.drawn // len(outcome.finals) if len(outcome.finals) == 1 else",
        "0 if len(outcome.finals) == 1 else",
        "tests/test_evaluate_run.py",
        "evaluation: a search costs nothing",
    ),
    Mutant(
        "terminal.py",
        "moved = done - self._first",
        "moved = done",
        "tests/test_evaluate_run.py",
        "evaluation: the ETA counts what was there before",
    ),
    Mutant(
        "serve.py",
        "history += _turn(",
        "history = _turn(",
        "tests/test_terminal.py -k conversation",
        "terminal: a conversation forgets all but its last turn",
    ),
    Mutant(
        "terminal.py",
        'Column(ratio=1, no_wrap=True, overflow="ellipsis")',
        "Column()",
        "tests/test_terminal.py -k 80_columns",
        "terminal: a long text takes the room of bar and ETA",
    ),
    Mutant(
        "report/end.py",
        "if c.isprintable()",
        "if c",
        "tests/test_terminal.py -k steer",
        "terminal: what a model wrote moves the cursor",
    ),
    Mutant(
        "handoff.py",
        'return "bfloat16" if "bfloat16" in (saved, began) else saved',
        "return saved",
        "tests/test_handoff.py",
        "export: bfloat16 weights come back as float32",
    ),
    Mutant(
        "report/run.py",
        "(-0.9, -0.6, -0.3, -0.1)",
        "(-0.9, -0.5, -0.3, -0.1)",
        "tests/test_report_run.py -k shaded",
        "report: tokens are shaded at other probabilities",
    ),
    Mutant(
        "rl/samples.py",
        "pending = [] if whole else pending",
        "pending = []",
        "tests/test_samples.py",
        "samples: half of a character is a piece",
    ),
    Mutant(
        "rl/samples.py",
        "gap = logp - sequence.completion.policy_logp",
        "gap = sequence.completion.policy_logp - logp",
        "tests/test_samples.py",
        "samples: the gap has the other sign",
    ),
    Mutant(
        "train/step.py",
        "carry[3][k].at[i].set(tokens[k])",
        "carry[3][k].at[0].set(tokens[k])",
        "tests/test_grpo_update.py -k four_updates",
        "step: every microbatch's tokens are those of the first",
    ),
    Mutant(
        "curate/instruct.py",
        "Novelty(math.nextafter(options.rouge_below, 0.0))",
        "Novelty(options.rouge_below)",
        "tests/test_instruct.py",
        "self-instruct: an instruction of exactly the limit is new",
    ),
    Mutant(
        "curate/tasks.py",
        "open_item = open_item and not any(part.strip() for part in items[-1])",
        "open_item = True",
        "tests/test_instruct.py",
        "self-instruct: what follows a list is part of its last task",
    ),
    Mutant(
        "train/worse.py",
        "math.hypot(p2 - l2, u1 - p1)",
        "(p2 - l2) + (u1 - p1)",
        "tests/test_worse.py",
        "evaluation: the interval of a change adds its halves",
    ),
    Mutant(
        "config/control.py",
        'or [RewardTerm(name="format")]',
        "",
        "tests/test_worse.py",
        "evaluation: a run without format rewards has no control",
    ),
    Mutant(
        "evaluate/accuracy.py",
        "accuracy = estimates.clustered(right_P_K)",
        "accuracy = estimates.clustered(right_P_K[:0])",
        "tests/test_hostile_answers.py::test_an_evaluation_grades_in_processes_that_are_killed",
        "evaluation: an evaluation's accuracy is of no problem",
    ),
    Mutant(
        "model/lora.py",
        "b.astype(x.dtype) * adapter.scale",
        "b.astype(x.dtype)",
        "tests/test_lora.py::test_one_dense_by_hand",
        "adapters: an adapter's product is not scaled",
    ),
    Mutant(
        "model/lora.py",
        '1.0 if name == "magnitude" else 0.0',
        '1.0 if name == "magnitude" else 0.1',
        "tests/test_lora.py::test_adapters_begin_as_the_model_itself",
        "adapters: B does not begin at zero",
    ),
    Mutant(
        "model/lora.py",
        "column_norms(lax.stop_gradient(_sum(leaves, adapter)))",
        "column_norms(_sum(leaves, adapter))",
        "tests/test_lora.py::test_gradients_are_those_of_the_full_weights_by_the_chain_rule",
        "adapters: DoRA's norm gets a gradient",
    ),
    Mutant(
        "train/step.py",
        "            second = config, rest\n",
        "            second = config, merge(weights, rest)\n",
        "tests/test_lora.py::test_a_loss_compares_with_the_base_that_the_state_holds",
        "adapters: the base that a loss compares with has its adapters",
    ),
    Mutant(
        "train/optimizer.py",
        'path[-1].key == "lora_b" else u',
        'path[-1].key == "lora_a" else u',
        "tests/test_lora.py::test_b_may_learn_faster_than_a_and_magnitudes_do_not_decay",
        "adapters: LoRA+ scales A",
    ),
    Mutant(
        "checkpoint.py",
        "return _held(state) if model.adapter else state.model_params",
        "return state.model_params",
        "tests/test_lora.py::test_a_checkpoint_holds_adapters_resumes_bitwise_and_opens_merged",
        "adapters: a checkpoint of adapters holds the base, too",
    ),
    Mutant(
        "data/tokenizer.py",
        'if isinstance(found.get("extra_special_tokens"), list):',
        "if False:",
        "tests/test_encode.py::test_further_special_tokens_are_saved_as_transformers_4_reads_them",
        "transformers 4 cannot open an export with further special tokens",
    ),
    Mutant(
        "hf/gguf.py",
        "halves.swapaxes(1, 2)",
        "halves",
        "tests/test_gguf.py::test_rows_of_queries_and_keys_are_neighbours",
        "GGUF: llama.cpp rotates other channels than were trained",
    ),
    Mutant(
        "hf/gguf.py",
        'kinds.append("NORMAL" if len(text) == 1 else "USER_DEFINED")',
        'kinds.append("NORMAL")',
        "tests/test_gguf.py",
        "GGUF: llama.cpp spells the task's words in bytes",
    ),
    Mutant(
        "hf/peft.py",
        "return value.T if self.transposed else value",
        "return value.reshape(value.T.shape) if self.transposed else value",
        "tests/test_lora.py::test_peft_files_by_name_and_shape_and_back",
        "adapters: PEFT's matrices are not transposed",
    ),
    Mutant(
        "model/lora.py",
        '"lora_b": jnp.concatenate([adapters["lora_b"], -starts["start_b"]], axis=-2)',
        '"lora_b": jnp.concatenate([adapters["lora_b"], starts["start_b"]], axis=-2)',
        "tests/test_pissa.py::test_a_run_resumes_bitwise_and_leaves_as_an_adapter_of_the_model_itself",
        "adapters: where PiSSA began is added to the model that it is part of",
    ),
    Mutant(
        "model/blocks.py",
        ' or self.has_variable("params", "start_a")',
        "",
        "tests/test_pissa.py::test_a_run_begins_as_the_model_and_that_is_the_reference",
        "adapters: the reference of PiSSA is the residual",
    ),
    Mutant(
        "model/decoder.py",
        "lora.merged({name: child for name, child in params.items() if name != \"layers\"}, config.adapter)",
        "{name: child for name, child in params.items() if name != \"layers\"}",
        "tests/test_lora_tables.py::test_they_begin_as_the_model_and_compute_what_changed_tables_do",
        "adapters: decoding has the tables without theirs",
    ),
    Mutant(
        "weights.py",
        "if not source.path.exists() or source.digest() != base.digest:",
        "if False:",
        "tests/test_lora.py::test_a_base_that_is_gone_is_said",
        "adapters: the base of adapters is not checked",
    ),
    Mutant(
        "rl/grpo.py",
        'others["ref_logp"].put(state.frozen)',
        'others["ref_logp"].put(state.model_params)',
        "tests/test_lora.py::test_grpo_has_the_base_for_its_reference",
        "adapters: the reference of a KL has the adapters",
    ),
    Mutant(
        "model/quantized.py",
        "pairs[:, 0] | pairs[:, 1] << 4",
        "pairs[:, 1] | pairs[:, 0] << 4",
        "tests/test_quantized.py::test_a_block_by_hand",
        "a quantized base: two codes change places in their byte",
    ),
    Mutant(
        "model/quantized.py",
        "tuple((a + b) / 2 for",
        "tuple((2 * a + b) / 3 for",
        "tests/test_quantized.py::test_matrices_by_a_twin_in_numpy_and_within_their_bounds",
        "a quantized base: a code is not the nearest",
    ),
    Mutant(
        "model/quantized.py",
        "return jax.checkpoint(times, prevent_cse=not scanned)(x, stored)",
        "return times(x, stored)",
        "tests/test_quantized.py::test_no_pass_keeps_the_matrices_of_all_layers",
        "a quantized base: the backward pass keeps every layer's matrices",
    ),
    Mutant(
        "model/decoder.py",
        "[quantized.map_plain(cast, layer) for layer in layers]",
        "[jax.tree.map(cast, layer) for layer in layers]",
        "tests/test_quantized.py::test_what_is_kept_as_codes_is_not_cast",
        "a quantized base: codes are cast to the compute dtype",
    ),
    Mutant(
        "weights.py",
        "source.params(beside.replace(param_dtype=stored), mesh, starts)",
        "source.params(config.replace(param_dtype=stored), mesh, starts)",
        "tests/test_lora.py::test_a_checkpoint_holds_adapters_resumes_bitwise_and_opens_merged",
        "a quantized base: adapters are merged into what they were not trained beside",
    ),
    Mutant(
        "sharding.py",
        'path = path[:-1] if path[-2:-1] == ("kernel",) else path',
        "path = path",
        "tests/test_lora.py::test_microbatches_packing_written_out_layers_and_meshes_change_nothing",
        "a quantized base: it is whole on every device",
    ),
    Mutant(
        "model/attention.py",
        "return p, ds, _take(q_t, i, block, 4), _take(grad_t, i, block, 4), k_j",
        "return p, ds, _take(grad_t, i, block, 4), _take(q_t, i, block, 4), k_j",
        "tests/test_attention.py",
        "blockwise attention, backward: queries and gradients change places",
    ),
    Mutant(
        "xla.py",
        "stays = _HUGE in given or",
        "stays = bool(given) or",
        "tests/test_xla.py",
        "huge pages: other tunables of the user keep them away",
    ),
    Mutant(
        "xla.py",
        " or sys.argv[0] not in sys.orig_argv",
        "",
        "tests/test_xla.py",
        "huge pages: a notebook that runs a script starts again",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
