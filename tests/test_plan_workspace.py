"""cuDNN's scratch space against what an H100 allocated: jax 0.11.2, Llama-3.2-3B, rows of 8,192."""

import pytest

from jaxreason.plan.workspace import backward_bytes

GIB = 2**30


def test_bytes_of_the_buffer_that_the_card_made():
    assert 0 <= 1_616_907_008 - backward_bytes(1, 8192, 8, 24, 128) <= 4096


@pytest.mark.parametrize(("segments", "compiled", "measured"), [(32, 60.95, 66.58), (8, 60.44, 61.56)])
def test_with_it_the_compilers_sum_is_the_allocators_peak(segments, compiled, measured):
    assert compiled + backward_bytes(1, 8192, segments, 24, 128) / GIB == pytest.approx(measured, rel=0.01)
