"""Seconds of kernels by hand: what a fusion moves, what a product and cuDNN's attention take, and which kind they are."""

import dataclasses

import pytest

from jaxreason import targets
from jaxreason.plan import hlo, timing
from jaxreason.plan.timing import Documents

# 1 TB/s and 100 TFLOP/s on 100 cores, of which everything reaches half but products, which reach all
RATES = targets.Rates(
    kernel_seconds=1e-6, bandwidth=0.5, elementwise=0.25, product=1.0, product_depth=0, product_bandwidth=0.5,
    attention_forward=0.5, attention_backward=0.25, attention_tokens=0, decode_bandwidth=0.5,
)  # fmt: skip
CARD = dataclasses.replace(
    targets.load("h100"), memory_bytes_per_s=1e12, bf16_flops_per_s=100e12, cores=100, rates=RATES
)

TEXT = """HloModule jit_step

%sliced (p: f32[28,1000], at: s32[]) -> bf16[1,1000] {
  %p = f32[28,1000]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %piece = f32[1,1000]{1,0} dynamic-slice(%p, %at), dynamic_slice_sizes={1,1000}
  ROOT %half = bf16[1,1000]{1,0} convert(%piece)
}

%placed (p: bf16[28,1000], at: s32[], new: bf16[1,1000]) -> bf16[28,1000] {
  %p = bf16[28,1000]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %new = bf16[1,1000]{1,0} parameter(2)
  ROOT %whole = bf16[28,1000]{1,0} dynamic-update-slice(%p, %new, %at)
}

%added (sum: f32[28,1000], at: s32[], new: bf16[1,1000]) -> f32[28,1000] {
  %sum = f32[28,1000]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %new = bf16[1,1000]{1,0} parameter(2)
  %there = f32[1,1000]{1,0} dynamic-slice(%sum, %at), dynamic_slice_sizes={1,1000}
  %wide = f32[1,1000]{1,0} convert(%new)
  %both = f32[1,1000]{1,0} add(%there, %wide)
  ROOT %whole = f32[28,1000]{1,0} dynamic-update-slice(%sum, %both, %at)
}

%filled (zero: f32[]) -> f32[1000,1000] {
  %zero = f32[] parameter(0)
  ROOT %all = f32[1000,1000]{1,0} broadcast(%zero), dimensions={}
}

%squared (x: f32[1000,1000]) -> (f32[1000,1000], f32[1000,1000]) {
  %x = f32[1000,1000]{1,0} parameter(0)
  %y = f32[1000,1000]{1,0} multiply(%x, %x)
  ROOT %two = (f32[1000,1000]{1,0}, f32[1000,1000]{1,0}) tuple(%y, %y)
}

%body (p: (s32[], f32[28,1000])) -> (s32[], f32[28,1000]) {
  %p = (s32[], f32[28,1000]{1,0}) parameter(0)
  %w = f32[28,1000]{1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %cast = bf16[1,1000]{1,0} fusion(%w, %i), kind=kLoop, calls=%sliced
  %sum = f32[28,1000]{1,0} fusion(%w, %i, %cast), kind=kLoop, calls=%added
  ROOT %t = (s32[], f32[28,1000]{1,0}) tuple(%i, %sum)
}

ENTRY %main (a: bf16[1024,3072]) -> f32[28,1000] {
  %a = bf16[1024,3072]{1,0} parameter(0)
  %b = bf16[3072,25600]{1,0} parameter(1)
  %stack = bf16[28,1000]{1,0} parameter(2)
  %at = s32[] parameter(3)
  %new = bf16[1,1000]{1,0} parameter(4)
  %x = f32[1000,1000]{1,0} parameter(5)
  %product = (bf16[1024,25600]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", DIMENSIONS
  %kept = bf16[28,1000]{1,0} fusion(%stack, %at, %new), kind=kCustom, calls=%placed
  %zeros = f32[1000,1000]{1,0} fusion(%x), kind=kLoop, calls=%filled
  %twice = (f32[1000,1000]{1,0}, f32[1000,1000]{1,0}) fusion(%x), kind=kLoop, calls=%squared
  %moved = f32[1000,1000]{0,1} copy(%x)
  %loop = (s32[], f32[28,1000]{1,0}) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"28"}}
  ROOT %out = f32[28,1000]{1,0} get-tuple-element(%loop), index=1
}
""".replace("DIMENSIONS", 'backend_config={"lhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}')


def test_a_fusion_moves_what_it_touches_and_not_what_it_is_given():
    bodies, entry = hlo.computations(TEXT)
    assert entry == "main"
    moved = {name: timing.traffic(bodies[name]) for name in ("sliced", "placed", "added", "filled", "squared")}
    assert moved == {
        "sliced": 4000 + 4 + 2000,  # the slice in float32, where it is, and the slice in bfloat16
        "placed": 2000 + 4 + 2000,  # the stack itself is neither read nor written
        "added": 4000 + 4 + 2000 + 4000,
        "filled": 4 + 4_000_000,
        "squared": 3 * 4_000_000,
    }


def test_every_kernel_has_its_kind_its_times_and_its_seconds():
    found = {cost.name: cost for cost in timing.costs(TEXT, 1, CARD, Documents(0.0))}
    assert {name: (cost.kind, cost.times) for name, cost in found.items()} == {
        "product": ("matrix products", 1), "kept": ("copies and conversions", 1), "zeros": ("filling memory", 1),
        "twice": ("other elementwise and sums", 1), "moved": ("copies and conversions", 1),
        "cast": ("copies and conversions", 28), "sum": ("adding gradients", 28),
    }  # fmt: skip
    assert found["moved"].seconds == pytest.approx(8e6 / 0.5e12 + 1e-6)
    assert found["twice"].seconds == pytest.approx(12e6 / 0.25e12 + 1e-6)
    assert found["sum"].seconds == pytest.approx(28 * (10_004 / 0.5e12 + 1e-6))
    # 8 x 100 tiles of 128 x 256 on 100 cores: 8 full rounds, so the time of the FLOPs at peak
    assert found["product"].seconds == pytest.approx(2 * 1024 * 25600 * 3072 / 100e12 + 1e-6)
    kinds = timing.by_kind([*found.values()])
    assert next(iter(kinds)) == "matrix products" and list(kinds.values()) == sorted(kinds.values(), reverse=True)
    assert sum(kinds.values()) == pytest.approx(sum(cost.seconds for cost in found.values()))


def test_a_product_pays_for_rounds_that_are_not_full_for_its_depth_and_for_its_operands():
    whole = timing.product_seconds(1, 1024, 25600, 3072, 0, CARD)
    # one row more needs nine rows of tiles; of 128 x 256 that is 9 rounds, of smaller tiles more
    assert timing.product_seconds(1, 1025, 25600, 3072, 0, CARD) == pytest.approx(whole * 9 / 8)
    deep = dataclasses.replace(CARD, rates=dataclasses.replace(RATES, product_depth=1024))
    assert timing.product_seconds(1, 1024, 25600, 3072, 0, deep) == pytest.approx(whole * 4096 / 3072)
    assert timing.product_seconds(4, 256, 25600, 3072, 0, CARD) == pytest.approx(whole)
    # one row: 50 GB at half of 1 TB/s take longer than any tile
    assert timing.product_seconds(1, 1, 25600, 3072, 50 * 10**9, CARD) == pytest.approx(0.1)


FORWARD = """ENTRY %main (q: bf16[1,8192,24,128]) -> bf16[1,24,8192,128] {
  %q = bf16[1,8192,24,128]{3,2,1,0} parameter(0)
  %k = bf16[1,8192,8,128]{3,2,1,0} parameter(1)
  %stat = f32[8,24,8192]{2,1,0} parameter(2)
  %o = (bf16[1,24,8192,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), CUDNNForward
  ROOT %d = (bf16[1,24,8192,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %stat, %q, %q), CUDNNBackward
}
"""
DECODING = """ENTRY %main (q: bf16[64,24,1,128]) -> bf16[64,24,1,128] {
  %q = bf16[64,24,1,128]{3,2,1,0} parameter(0)
  %k = bf16[64,8,1152,128]{3,2,1,0} parameter(1)
  ROOT %o = (bf16[64,24,1,128]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), CUDNNForward
}
"""


def calls(text: str) -> str:
    """``text`` with the targets of cuDNN's calls, packed for 8 segments."""
    for direction, suffix in (("Forward", ""), ("Backward", "Backward")):
        named = f'custom_call_target="__cudnn$fmhaSoftmax{suffix}", backend_config={{"max_seg_per_batch": 8}}'
        text = text.replace(f"CUDNN{direction}", named)
    return text


def test_attention_takes_its_documents_and_its_helpers():
    # two documents of 4,096: 2 N H Σs² FLOPs forward, 2.5 times that backward
    work = 2 * 24 * 128 * 2 * 4096**2
    found = {cost.name: cost.seconds for cost in timing.costs(calls(FORWARD), 1, CARD, Documents(2 * 4096**2))}
    assert found["o"] == pytest.approx(work / 50e12 + 1e-6)
    # one value of dO·O for each of 8 segments' rows, and the gradients' conversions: 2·8 + 16 bytes an element of q
    helpers = (2 * 8 + 16) * 8192 * 24 * 128
    assert found["d"] == pytest.approx(2.5 * work / 25e12 + helpers / 1e12 + 1e-6)
    tokens = dataclasses.replace(CARD, rates=dataclasses.replace(RATES, attention_tokens=4096))
    one = {cost.name: cost.seconds for cost in timing.costs(calls(FORWARD), 1, tokens, Documents(2 * 4096**2))}
    assert one["o"] == pytest.approx(2 * work / 50e12 + 1e-6)


def test_decoding_reads_keys_and_values_of_live_positions():
    (cost,) = timing.costs(calls(DECODING), 1, CARD, Documents(0.0, context=640))
    assert cost.kind == "attention"
    assert cost.seconds == pytest.approx(2 * 2 * 64 * 8 * 640 * 128 / 0.5e12 + 1e-6)


def test_a_target_without_rates_of_its_own_says_whose_it_has():
    h100, a100 = targets.load("h100"), targets.load("a100")
    assert (h100.rates_measured_on, a100.rates_measured_on) == ("h100", "h100") and a100.rates == h100.rates
