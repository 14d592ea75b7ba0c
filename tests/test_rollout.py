"""The engine against transformers and the full forward, and against itself with other slots, chunks and neighbours."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason import config as cfg
from jaxreason import hf, model
from jaxreason.errors import UserError
from jaxreason.sampler import Engine, Sampling
from jaxreason.sampler.engine import cache, generation
from jaxreason.sampler.engine.generation import fewer
from jaxreason.sampler.engine.spread import spread
from jaxreason.sharding import make_mesh, replicated

CONFIG = model.make_config(
    vocab_size=97, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12,
    rope_theta=10000.0, max_positions=512, init_std=0.3,
)  # fmt: skip
STOPS = (5, 11, 40)


@pytest.fixture(scope="module")
def params():
    return model.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def unstacked(params):
    return model.unstack(params, CONFIG)


def ragged(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.arch.vocab_size, n).tolist() for n in lengths]


PROMPTS = ragged([1, 2, 17, 30, 9])
SAMPLED = Sampling(30, temperature=1.3, top_p=0.95)


def make(slots=4, chunk=8, sampling=SAMPLED, stops=STOPS) -> Engine:
    return Engine(CONFIG, stops, sampling, slots, chunk)


def ids(completions):
    return [(c.prompt_index, c.sample_index, c.tokens.tolist(), c.truncated) for c in completions]


@pytest.fixture(scope="module")
def reference(unstacked):
    """Three samples of every prompt; more sequences than slots, so that slots are refilled."""
    return make().generate(unstacked, PROMPTS, 3, seed=1, step=2)


def test_order_stop_tokens_and_lengths(reference):
    assert [(c.prompt_index, c.sample_index) for c in reference] == [(p, g) for p in range(5) for g in range(3)]
    assert {c.truncated for c in reference} == {True, False}  # both endings occur, or this test shows nothing
    for c in reference:
        assert c.tokens.dtype == np.int32 and len(c.tokens) == len(c.behaviour_logp) == len(c.policy_logp)
        assert not np.isin(c.tokens[:-1], STOPS).any()
        assert np.isin(c.tokens[-1], STOPS) == (not c.truncated)
        assert len(c.tokens) == 30 if c.truncated else len(c.tokens) <= 30
    ends = {int(c.tokens[-1]) for c in reference if not c.truncated}
    assert len(ends) > 1  # every stop id ends a completion, not only the first


def test_a_stop_token_at_the_limit_is_not_truncation(unstacked, reference):
    stopped = next(c for c in reference if not c.truncated)
    sampling = Sampling(len(stopped.tokens), temperature=1.3, top_p=0.95)
    again = make(sampling=sampling).generate(unstacked, PROMPTS, 3, seed=1, step=2)
    same = next(c for c in again if (c.prompt_index, c.sample_index) == (stopped.prompt_index, stopped.sample_index))
    assert same.tokens.tolist() == stopped.tokens.tolist() and not same.truncated


@pytest.mark.parametrize(("slots", "chunk"), [(4, 64), (7, 64), (32, 8)])
def test_slots_and_chunk_change_nothing(unstacked, reference, slots, chunk):
    found = make(slots, chunk).generate(unstacked, PROMPTS, 3, seed=1, step=2)
    assert ids(found) == ids(reference)
    for a, b in zip(found, reference):
        np.testing.assert_allclose(a.policy_logp, b.policy_logp, atol=1e-5)


@pytest.fixture(scope="module")
def everywhere(unstacked):
    """The weights whole on eight devices."""
    return jax.device_put(unstacked, replicated(make_mesh(cfg.Mesh())))


@pytest.mark.parametrize(("slots", "chunk", "devices"), [(7, 64, 7), (9, 8, 8)])
def test_devices_change_nothing(everywhere, reference, slots, chunk, devices):
    """No more devices than slots, and as many slots on each: 9 slots are 16 on 8 devices."""
    engine = make(slots, chunk)
    found = engine.generate(everywhere, PROMPTS, 3, seed=1, step=2)
    (mesh,) = engine._programs
    assert mesh.size == devices
    assert ids(found) == ids(reference)
    for a, b in zip(found, reference):
        np.testing.assert_allclose(a.policy_logp, b.policy_logp, atol=1e-5)
        np.testing.assert_allclose(a.behaviour_logp, b.behaviour_logp, atol=1e-5)


def test_each_device_decodes_its_share_of_the_slots(everywhere):
    """Caches and slots stay split while buffers grow, are refilled and are decoded with; greedy is as on one device."""
    sampling, prompts, seen = Sampling(60, temperature=0.0), ragged([20, 3, 9, 33, 1, 12]), []
    engine = make(16, 16, sampling, ())
    inner = engine.programs(spread(everywhere, 16)[1])

    def decode(params, slots, caches, idle_at):
        seen.extend((leaf.shape, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(caches))
        assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves((params, slots, caches)))
        return inner.decode(params, slots, caches, idle_at)

    engine.programs = lambda mesh: inner._replace(decode=decode)
    found = engine.generate(everywhere, prompts, 4, seed=0, step=0)
    assert {(whole[2], whole[0] // share[0]) for whole, share in seen} == {(64, 8), (128, 8)}
    assert all(whole[1:] == share[1:] for whole, share in seen)
    alone = make(3, 16, sampling, ()).generate(jax.device_put(everywhere, jax.devices()[3]), prompts, 4, seed=0, step=0)
    assert ids(found) == ids(alone)


def test_split_weights_are_decoded_with_as_they_are(unstacked):
    """Too large for one device: one program over all of them, as the partitioner makes it."""
    split = NamedSharding(make_mesh(cfg.Mesh()), PartitionSpec("fsdp"))
    whole = replicated(split.mesh)
    params = jax.tree.map(lambda w: jax.device_put(w, whole if w.shape[0] % 8 else split), unstacked)
    same, mesh = spread(params, 4)
    assert mesh is None and same is params


def test_calls_that_share_a_step_draw_what_one_call_draws(unstacked, reference):
    """As processes do, each with its part of the prompts: the key counts prompts of the whole step."""
    engine = make()
    head = engine.generate(unstacked, PROMPTS[:2], 3, seed=1, step=2)
    tail = engine.generate(unstacked, PROMPTS[2:], 3, seed=1, step=2, first_prompt=2)
    assert [c.tokens.tolist() for c in head + tail] == [c.tokens.tolist() for c in reference]
    assert [c.prompt_index for c in tail] == [0] * 3 + [1] * 3 + [2] * 3
    assert ids(engine.generate(unstacked, PROMPTS[2:], 3, seed=1, step=2)) != ids(tail)


@pytest.mark.parametrize(("slots", "devices", "widths"), [(32, 1, [32, 8, 4]), (64, 8, [64, 32])])
def test_what_still_runs_moves_into_fewer_slots(unstacked, everywhere, slots, devices, widths):
    """40 sequences; a device's share becomes a quarter, and that a quarter, once nothing waits and so few still run."""
    params, seen = unstacked if devices == 1 else everywhere, []
    spread_lengths = Sampling(34, temperature=1.3), (5, 11, *range(40, 48))
    engine = make(slots, 2, *spread_lengths)
    inner = engine.programs(spread(params, slots)[1])

    def decode(params, slots, caches, idle_at):
        seen.append(slots.token.shape[0])
        assert {leaf.shape[0] for leaf in jax.tree.leaves(caches)} == {seen[-1]}
        return inner.decode(params, slots, caches, idle_at)

    engine.programs = lambda mesh: inner._replace(decode=decode)
    found = engine.generate(params, PROMPTS, 8, seed=1, step=2)
    assert list(dict.fromkeys(seen)) == widths
    assert ids(found) == ids(make(4, 8, *spread_lengths).generate(unstacked, PROMPTS, 8, seed=1, step=2))


def test_how_many_slots_decode_on():
    assert [fewer(64, live) for live in (64, 17, 16, 5, 4, 1)] == [64, 64, 16, 16, 4, 4]
    assert [fewer(160, live) for live in (41, 40, 10, 4)] == [160, 40, 10, 4]  # 160 → 40 → 10 → 4
    assert [fewer(slots, 1) for slots in (1, 4, 7, 8)] == [1, 4, 7, 4]


def test_neighbours_change_nothing(unstacked, reference):
    others = [*PROMPTS[:3], *ragged([40, 3], seed=9)]
    assert ids(make().generate(unstacked, others, 3, seed=1, step=2))[:9] == ids(reference)[:9]
    assert ids(make().generate(unstacked, PROMPTS, 5, seed=1, step=2))[:3] == ids(reference)[:3]


def test_seed_step_and_sample_each_change_the_draws(unstacked, reference):
    engine = make()
    assert ids(engine.generate(unstacked, PROMPTS, 3, seed=2, step=2)) != ids(reference)
    assert ids(engine.generate(unstacked, PROMPTS, 3, seed=1, step=3)) != ids(reference)
    assert reference[0].tokens.tolist() != reference[1].tokens.tolist()


def test_log_probabilities_equal_the_full_forward(params, reference):
    rows = np.zeros((len(reference), 64), np.int32)
    for row, c in zip(rows, reference):
        whole = PROMPTS[c.prompt_index] + c.tokens.tolist()
        row[: len(whole)] = whole
    every = np.asarray(jax.jit(model.logits, static_argnums=1)(params, CONFIG, rows), np.float64) / 1.3
    for row, c in zip(every, reference):
        start = len(PROMPTS[c.prompt_index]) - 1
        logits = row[start : start + len(c.tokens)]
        full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(c.policy_logp, full[np.arange(len(c.tokens)), c.tokens], atol=1e-4)
        for t, token in enumerate(c.tokens):
            order = np.argsort(-full[t])
            nucleus = order[: np.searchsorted(np.cumsum(np.exp(full[t][order])), 0.95) + 1]
            assert token in nucleus
            expected = full[t, token] - np.log(np.exp(full[t][nucleus]).sum())
            np.testing.assert_allclose(c.behaviour_logp[t], expected, atol=1e-4)


def test_greedy_equals_transformers_generate(tmp_path):
    """Ragged prompts in one batch, more of them than slots, across the growth of the buffers from 64 to 128."""
    import torch
    from transformers import AutoModelForCausalLM

    config, prompts = CONFIG.replace(tie_embeddings=False), [*PROMPTS, *ragged([70], seed=6)]
    params = model.init(config, jax.random.key(3))
    hf.save(params, config, tmp_path / "hf", dtype="float32")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    width = max(map(len, prompts))
    padded, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):  # transformers pads on the left
        padded[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    with torch.inference_mode():
        out = twin.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=50,
            eos_token_id=list(STOPS), pad_token_id=0,
        )[:, width:].tolist()  # fmt: skip

    engine = Engine(config, STOPS, Sampling(50, temperature=0.0), slots=3, chunk=16)
    found = engine.generate(model.unstack(params, config), prompts, 2, seed=0, step=0)

    assert [c.tokens.tolist() for c in found[::2]] == [c.tokens.tolist() for c in found[1::2]]
    assert not any(c.behaviour_logp.any() for c in found) and all(c.policy_logp.all() for c in found)
    found = found[::2]
    lengths = [len(c.tokens) for c in found]
    assert min(lengths) < 50 and max(lengths) > 1
    assert [c.tokens.tolist() for c in found] == [row[:n] for row, n in zip(out, lengths)]
    for row, n in zip(out, lengths):  # and transformers stopped there as well
        assert n == 50 or row[n - 1] in STOPS


def test_each_prompt_is_prefilled_once(unstacked):
    engine, rows = make(), []
    inner = engine.programs()
    noted = lambda params, tokens, segments: (  # noqa: E731
        rows.extend(row[mask > 0].tolist() for row, mask in zip(tokens, segments)),
        inner.prefill(params, tokens, segments),
    )[1]
    engine.programs = lambda mesh: inner._replace(prefill=noted)
    engine.generate(unstacked, PROMPTS, 6, seed=0, step=0)
    # All but the last token, which decoding feeds; prompt 0 has no other.
    assert [row for row in rows if row] == [prompt[:-1] for prompt in PROMPTS[1:]]


FILL, DECODE = "jit(fill)", "jit(_decode)"


def test_a_second_call_with_other_lengths_compiles_nothing(unstacked, compiled):
    config = CONFIG.replace(max_positions=300)  # shared by no other test, and so is what it compiles
    engine = Engine(config, STOPS, SAMPLED, slots=4, chunk=16)
    engine.generate(unstacked, ragged([3, 30, 12, 7, 1]), 2, seed=0, step=0)
    assert (compiled[FILL], compiled[DECODE]) == (2, 1)  # prefills of 16 and of 32 tokens
    compiled.clear()
    engine.generate(unstacked, ragged([9, 2, 25, 14, 33], seed=1), 2, seed=0, step=1)
    assert not compiled


def test_long_sequences_add_one_compile_a_bucket(unstacked, compiled):
    config = CONFIG.replace(max_positions=301)
    engine = Engine(config, (), Sampling(100), slots=2, chunk=32)
    found = engine.generate(unstacked, ragged([5]), 2, seed=0, step=0)
    assert [len(c.tokens) for c in found] == [100, 100]
    assert (compiled[FILL], compiled[DECODE]) == (1, 2)  # buffers of 64 and 128
    compiled.clear()
    again = Engine(config, (), Sampling(100), slots=2, chunk=32)
    again.generate(unstacked, ragged([4]), 2, seed=0, step=0)
    assert not compiled  # an engine made anew reuses them


def test_where_buffer_length_is_free_one_program_decodes_everything(unstacked, monkeypatch, compiled):
    config, prompts = CONFIG.replace(max_positions=302), ragged([5, 20])
    wanted = Engine(config, (), Sampling(100), slots=8, chunk=32).generate(unstacked, prompts, 4, seed=0, step=0)
    assert compiled[DECODE] > 1
    compiled.clear()
    monkeypatch.setattr(generation, "one_length", lambda config: True)
    engine = Engine(config.replace(max_positions=303), (), Sampling(100), slots=8, chunk=32)
    assert ids(engine.generate(unstacked, prompts, 4, seed=0, step=0)) == ids(wanted)
    engine.generate(unstacked, prompts[:1], 1, seed=0, step=0)  # slots that stay empty, and no longer prompt
    assert compiled[DECODE] == 1


def test_streaming_and_progress(unstacked, reference):
    streamed, seen = {}, []
    engine = make()
    found = engine.generate(
        unstacked, PROMPTS, 3, seed=1, step=2, params_step=17,
        on_tokens=lambda p, g, tokens: streamed.setdefault((p, g), []).extend(tokens.tolist()),
        progress=lambda *numbers: seen.append(numbers),
    )  # fmt: skip
    assert streamed == {(c.prompt_index, c.sample_index): c.tokens.tolist() for c in reference}
    assert seen[-1] == (15, 15, sum(len(c.tokens) for c in reference)) and seen == sorted(seen)
    assert {c.params_step for c in found} == {17}


def test_no_prompts_no_completions(unstacked):
    assert make().generate(unstacked, [], 4, seed=0, step=0) == []


def test_completions_do_not_depend_on_what_a_slot_held_before(unstacked, reference):
    engine = make()
    engine.generate(unstacked, ragged([30, 20, 34], seed=4), 2, seed=5, step=0)
    assert ids(engine.generate(unstacked, PROMPTS, 3, seed=1, step=2)) == ids(reference)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 has no tokens"),
        ([[1], [2] * 483], "prompt 1 has 483 tokens and max_completion_tokens is 30.*512 positions.*482 tokens"),
        ([[1, 97]], "prompt 0 has the token id 97"),
    ],
)
def test_prompts_that_cannot_run_are_named(unstacked, prompts, message):
    with pytest.raises(UserError, match=message):
        make().generate(unstacked, prompts, 1, seed=0, step=0)


def test_the_longest_prompt_that_fits_runs(unstacked):
    found = make(slots=1, chunk=32, stops=()).generate(unstacked, ragged([482]), 1, seed=0, step=0)
    assert len(found[0].tokens) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"slots": 0}, "slots is 0"), ({"chunk": 0}, "chunk is 0"), ({"stops": (97,)}, "token id 97 .* vocabulary of 97")],
)
def test_wrong_engine_arguments_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_buckets():
    assert [cache.prompt_bucket(n, 200) for n in (0, 1, 16, 17, 129)] == [16, 16, 16, 32, 200]
    assert [cache.bucket(n, 10_240) for n in (1, 64, 65, 1000, 8193)] == [64, 64, 128, 1024, 10_240]
    assert [cache.longest(n) for n in (1, 64, 65, 500, 1000, 8704)] == [64, 64, 128, 512, 1024, 10_240]
    for n in range(1, 20_000, 37):
        assert n <= cache.longest(n) <= max(64 + n, 1.25 * n)


def test_kv_bytes():
    # 100 + 30 positions → buffers of 192: 2 layers · k and v · 2 heads · 12 channels · 4 bytes = 384 bytes a position.
    assert cache.longest(130) == 192
    assert len(jax.local_devices()) == 8
    slots, prompts = 1 * 192, 1 * 128  # one slot keeps one device; the prompts of one prefill: as many as slots, 100 → 128
    assert make(slots=1).kv_bytes(100) == 384 * (slots + prompts)
    # 12 slots become 16 on 8 devices, and each of these holds the keys of one of two layers of 16 prompts for a moment.
    assert make(slots=12).kv_bytes(100) == 384 * 16 * (192 + 128) + 8 * 16 * 128 * 384 // 4
