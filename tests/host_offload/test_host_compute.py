"""Functions that run on the host inside a device program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from host_offload.host_compute import as_device, as_host, compiler_options, on_host
from host_offload.memory import to_device, to_host

X = np.arange(6, dtype=np.float32).reshape(2, 3)
W = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def test_arguments_are_on_the_host_and_results_on_the_device():
    spaces = {}

    def body(w, x):
        moved = as_host(x)
        spaces["w"], spaces["x"] = jax.typeof(w).memory_space, jax.typeof(moved).memory_space
        return {"y": moved @ w}

    @jax.jit
    def program(w, x):
        y = on_host(body, w, x)["y"]
        spaces["y"] = jax.typeof(y).memory_space
        return y + x[:, :1]

    result = program(to_host(W), to_device(X))
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    assert spaces == {"w": host, "x": host, "y": device}
    assert result.sharding.memory_kind == "device"
    np.testing.assert_allclose(result, X @ W + X[:, :1], rtol=1e-6)


@pytest.mark.parametrize("choice", [0, 1])
def test_control_flow_runs_on_the_host(choice):
    """A branch and a loop, which is what experts on the host consist of."""

    def body(weights, x, choice):
        x = as_host(x)
        branches = [lambda x, w=w: x @ w for w in weights]
        return lax.fori_loop(
            0, choice + 1, lambda i, y: y + lax.switch(choice, branches, x), x @ weights[0] * 0
        )

    program = jax.jit(
        lambda weights, x, choice: on_host(body, weights, x, choice),
        compiler_options=compiler_options(),
    )
    result = program(to_host((W, -W)), to_device(X), jnp.int32(choice))
    np.testing.assert_allclose(result, [X @ W, -2 * (X @ W)][choice], rtol=1e-6)


def test_one_function_may_be_called_twice():
    double = lambda x: as_host(x) * 2
    result = jax.jit(lambda x: on_host(double, on_host(double, x)))(to_device(X))
    np.testing.assert_array_equal(result, X * 4)


def test_host_arrays_are_copied_to_the_device():
    spaces = []

    @jax.jit
    def program(w):
        arrived = as_device((w,))[0]
        spaces.append(jax.typeof(arrived).memory_space)
        return arrived + 1

    result = program(to_host(W))
    assert spaces == [jax.memory.Space.Device]
    assert result.sharding.memory_kind == "device"
    np.testing.assert_array_equal(result, W + 1)
