"""The plan's arithmetic by hand, what it reads out of a program's text, and what it makes of a config."""

import numpy as np
import pytest

from jaxreason import cli, targets
from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.model import PRESETS
from jaxreason.model.flops import matmul_weights, train_flops_per_token
from jaxreason.plan import architecture, changes, compile, hlo, options, roofline
from jaxreason.plan.options import Options

LLAMA_3B = PRESETS["llama3.2-3b"].replace(compute_dtype="bfloat16")
H100 = targets.load("h100")


def test_flops_of_a_token():
    # 3,212,749,824 parameters less 57 norms of 3072
    assert matmul_weights(LLAMA_3B) == 3_212_574_720
    whole = train_flops_per_token(LLAMA_3B, [8192])
    assert whole == 6 * 3_212_574_720 + 6 * 28 * 3072 * 8192 == 23_503_306_752
    # four documents in the row: a quarter of the attention; 6144 + 2048: Σs²/Σs = 5120
    assert train_flops_per_token(LLAMA_3B, [2048] * 4) == 6 * 3_212_574_720 + 6 * 28 * 3072 * 2048
    assert train_flops_per_token(LLAMA_3B, [6144, 2048]) == 6 * 3_212_574_720 + 6 * 28 * 3072 * 5120
    # an untied table is looked up for free and multiplied with once
    untied = LLAMA_3B.replace(tie_embeddings=False)
    assert matmul_weights(untied) == matmul_weights(LLAMA_3B)


def test_decoding_reads_weights_and_caches():
    assert roofline.kv_bytes_per_token(LLAMA_3B) == 114_688  # 28 layers x 2 x 8 heads x 128 x 2 bytes
    step = 2 * 3_212_574_720 + 64 * 1024 * 114_688  # 13.9 GB: 4.2 ms
    rate = roofline.decode_tokens_per_second(LLAMA_3B, H100, 64, 1024)
    np.testing.assert_allclose(rate, 64 * 3.352e12 / step)
    assert 15_380 < rate < 15_400


def test_collectives_on_a_ring():
    found = [hlo.Collective("all-gather", 10, 9 * 10**8), hlo.Collective("all-reduce", 1, 9 * 10**9)]
    # 9 GB gathered and twice 9 GB reduced, 7/8 of it over 450 GB/s
    np.testing.assert_allclose(roofline.collective_seconds(found, H100, 1, 8), 27e9 * 7 / 8 / 450e9)
    # between hosts eight adapters of 50 GB/s carry what one ring sends
    np.testing.assert_allclose(roofline.collective_seconds(found, H100, 4, 8), 27e9 * 31 / 32 / 400e9)


def test_targets_and_their_limit():
    assert targets.names() == ["a100", "b200", "h100", "h200", "rtx3060", "rtx4090"]
    for name in targets.names():
        target = targets.load(name)
        assert f"device_memory_size: {target.memory_bytes}\n" in target.proto()
    assert "cuda_compute_capability { major: 8 minor: 9 " in targets.load("rtx4090").proto()
    # 0.92 x 84,942,979,072 less 2 GiB
    assert H100.limit_bytes == 78_147_540_746 - 2_147_483_648
    with pytest.raises(UserError, match="v100: unknown; one of a100, b200, h100, h200, rtx3060, rtx4090"):
        targets.load("v100")


HLO = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8,16]) -> f32[8,16] {
  ROOT %all-gather.9 = f32[8,16]{1,0} all-gather(%p), dimensions={0}
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ag = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), dimensions={0}
  %done = bf16[32,8]{1,0} all-gather-done(%ag)
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %y)
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %loop = (s32[], bf16[4,8]) while(%a), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"28"}}
  %rs = ((f32[32,8]{1,0}), f32[4,8]{1,0}) reduce-scatter-start(%g), dimensions={0}, to_apply=%add
  %call = (f32[8]{0}, u8[0]{0}) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t2 = (s32[], f32[4]) tuple(%i, %y)
}

ENTRY %main (p0: f32[8,16]) -> f32[8,16] {
  %ar = f32[100]{0} all-reduce(%p0), to_apply=%add
  %w = (s32[], f32[4]) while(%init), condition=%c, body=%outer
  ROOT %f = f32[8,16]{1,0} fusion(%p0), kind=kLoop, calls=%fused
}
"""


def test_collectives_are_counted_through_loops():
    found = {(c.kind, c.times, c.bytes) for c in hlo.collectives(HLO, loops=4)}
    # the outer loop's rounds are given (4), the inner one's are in the text (28); what a fusion defines does not count
    assert found == {("all-gather", 4 * 28, 32 * 8 * 2), ("reduce-scatter", 4, 32 * 8 * 4), ("all-reduce", 1, 400)}
    assert hlo.collectives(HLO, loops=4)[0].total_bytes == 4 * 28 * 512
    assert hlo.custom_calls(HLO, loops=4) == {"__cudnn$fmhaSoftmax": 4}
    assert hlo.shapes("(bf16[4,8]{1,0}, f32[])") == [("bf16", (4, 8)), ("f32", ())]


BLOCKWISE = """HloModule jit_step

%keys (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %tile = f32[4,4]{1,0} dot(%q, %k), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %tile)
}

%queries (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %q = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %k = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %inner = (s32[], f32[4,8]) while(%a), condition=%c, body=%keys
  ROOT %t2 = (s32[], f32[4,8]) tuple(%i, %y)
}

%rows (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %blocks = (s32[], f32[4,8]) while(%a), condition=%c, body=%queries, backend_config={"known_trip_count":{"n":"16"}}
  ROOT %t3 = (s32[], f32[4,8]) tuple(%i, %y)
}

ENTRY %main (p0: f32[4,8]) -> f32[4,8] {
  ROOT %w = (s32[], f32[4,8]) while(%init), condition=%c, body=%rows
}
"""


def test_blockwise_attention_is_counted_up_to_the_diagonal():
    # 5 microbatches of 16 query blocks: 1 + 2 + ... + 16 = 136 tiles of 2·4·4·8 FLOPs, that is 8.5 a query block, as 9
    assert hlo.matmul_flops(BLOCKWISE, loops=5) == 5 * 16 * 9 * 2 * 4 * 4 * 8
    # documents of a quarter of a row: 1 + 2 + 3 + 4 = 10 tiles for 4 query blocks, 2.5 each, as 3
    assert hlo.matmul_flops(BLOCKWISE, loops=5, share=0.25) == 5 * 16 * 3 * 2 * 4 * 4 * 8


ASYNCHRONOUS = """HloModule jit_step

%written (p0: bf16[28,4], p1: bf16[1,4]) -> bf16[28,4] {
  ROOT %update = bf16[28,4]{1,0} dynamic-update-slice(%p0, %p1, %zero, %zero)
}

ENTRY %main (a: bf16[28,4], b: bf16[1,4]) -> bf16[28,4] {
  %start = ((bf16[28,4]{1,0}, bf16[1,4]{1,0}), bf16[28,4]{1,0}, u32[]) fusion-start(%a, %b), kind=kLoop, calls=%written
  ROOT %done = bf16[28,4]{1,0} fusion-done(%start)
}
"""


def test_a_fusion_that_goes_on_beside_others_is_a_fusion():
    start, done = hlo.instructions(ASYNCHRONOUS)  # and what it fuses is no step of the program
    assert (start.name, start.kind, start.type, done.kind) == ("start", "fusion", "bf16[28,4]{1,0}", "fusion-done")


def test_architectures_of_weights_that_are_not_here():
    def of(weights):
        config, source = architecture.resolve(cfg.Model(weights=weights, remat="full", compute_dtype="bfloat16"))
        assert config.execution.remat == "full" and config.execution.compute_dtype == "bfloat16"
        return config.replace(remat="none", compute_dtype="float32"), source

    assert of("meta-llama/Llama-3.2-3B")[0] == PRESETS["llama3.2-3b"]
    assert of("Qwen/Qwen2.5-1.5B-Instruct")[0] == PRESETS["qwen2.5-1.5b"]
    assert of("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")[0].arch.rope_theta == 10000.0
    assert of("Qwen/Qwen3-8B")[0].arch.family == "qwen3"
    assert of("runs/llama3.2-1b-sft")[0] == PRESETS["llama3.2-1b"]
    assert "not here" in of("meta-llama/Llama-3.1-8B-Instruct")[1]
    with pytest.raises(UserError, match=r"acme/Unknown-7B is not here .* model.preset=NAME"):
        of("acme/Unknown-7B")


@pytest.mark.parametrize(
    ("hosts", "devices", "words"),
    [
        (1, 1, []),
        (1, 8, ["train.microbatch_size=8"]),
        (4, 8, ["train.microbatch_size=32", "data.batch_size=32"]),
    ],
)
def test_devices_that_need_more_rows_say_which_words(hosts, devices, words):
    config, found = options.fit_batch("llama3.2-3b/sft", [], Options(hosts=hosts, devices=devices))
    assert found == words
    assert config.data.batch_size % config.train.microbatch_size == 0
    assert config.train.microbatch_size % (hosts * devices) == 0


def test_candidates_go_from_free_to_expensive():
    words = ["optimizer.moment_dtype=float32", "train.microbatch_size=2", "model.remat=none"]
    config = cfg.load("llama3.2-3b/sft", words)
    found = changes.candidates(config, Options(), "update")
    assert found[0] == (["optimizer.moment_dtype=bfloat16"], 1)
    assert found[1] == (["train.microbatch_size=1"], 1)
    assert (["model.remat=matmuls"], 1) in found and ([], 2) in found
    assert all(devices <= 8 for _, devices in found)


def test_candidates_are_those_that_the_largest_program_has_need_of():
    config = cfg.load("llama3.2-3b/grpo", ["rollout.slots=160"])
    found = [words for words, devices in changes.candidates(config, Options(), "prefill") if devices == 1]
    assert found == [
        ["rollout.slots=80"], ["rollout.slots=40"], ["rollout.offload_state=true"], ["kl.offload=true"], ["kl.coef=0"],
    ]  # fmt: skip
    away = cfg.load("llama3.2-3b/grpo", ["rollout.slots=auto", "rollout.offload_state=true"])
    found = [words for words, devices in changes.candidates(away, Options(), "prefill") if devices == 1]
    assert found == [["kl.offload=true"], ["kl.coef=0"]]
    found = [words for words, _ in changes.candidates(config, Options(), "evaluation: decode")]
    assert found[0] == ["eval.slots=48"]
    found = [words for words, _ in changes.candidates(config, Options(), "update")]
    assert ["train.microbatch_size=1"] in found and ["kl.offload=true"] in found and ["rollout.slots=80"] not in found


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: None)
    assert cli.plan(["--config", "llama3.2-3b/sft"]) == 2
    assert "jaxreason[plan]" in capsys.readouterr().err


def test_wrong_sizes_are_refused(capsys):
    assert cli.plan(["--config", "llama3.2-3b/sft", "--devices", "0"]) == 2
    assert cli.plan(["--config", "llama3.2-3b/sft", "--target", "tpu"]) == 2
    assert "--devices 0" in capsys.readouterr().err
