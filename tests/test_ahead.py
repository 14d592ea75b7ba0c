"""What is compiled ahead computes what jit computes, waits, and fails where it is called; compilations are counted."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import config as cfg
from jaxreason.sharding import make_mesh, replicated
from jaxreason.train.ahead import Ahead, compilations

MESH = make_mesh(cfg.Mesh())
ONE = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=replicated(MESH))


def test_the_first_call_waits_for_a_compilation_in_another_thread():
    traced_in, go_on = [], threading.Event()

    def double(x):
        traced_in.append(threading.current_thread().name)
        go_on.wait(60)
        return 2 * x

    ahead = Ahead(jax.jit(double), MESH, ONE)
    go_on.set()
    given = jax.device_put(np.arange(4, dtype=np.float32), replicated(MESH))
    np.testing.assert_array_equal(ahead(given), [0, 2, 4, 6])
    np.testing.assert_array_equal(ahead(given), [0, 2, 4, 6])
    assert traced_in == ["compile"]  # once, and not here


def test_what_compiling_raises_is_raised_by_the_call():
    def wrong(x):
        raise RuntimeError("no such program")

    ahead = Ahead(jax.jit(wrong), MESH, ONE)
    with pytest.raises(RuntimeError, match="no such program"):
        ahead(jax.device_put(np.zeros(4, np.float32), replicated(MESH)))


def test_compilations_are_counted_once():
    compilations.take()
    jax.jit(lambda x: x * 3 + 1).lower(ONE).compile()
    found = compilations.take()
    assert found["compilations"] == 1 and found["compile_seconds"] > 0 and found["compilations_cached"] <= 1
    assert compilations.take() == {"compilations": 0, "compilations_cached": 0, "compile_seconds": 0.0}
