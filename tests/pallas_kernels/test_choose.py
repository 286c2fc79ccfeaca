import jax
import pytest

from pallas_kernels.choose import DEFAULTS, choose, default_implementation

TABLE = {"reference": lambda: "plain", "xla": lambda: "fast"}


def test_a_name_selects_its_implementation():
    assert choose("attention", TABLE, "reference") is TABLE["reference"]


def test_none_selects_the_default_of_the_backend():
    table = TABLE | {"gpu": lambda: "kernel", "tpu": lambda: "kernel"}
    default = {"cpu": "xla", "gpu": "gpu", "tpu": "tpu"}[jax.default_backend()]
    assert choose("attention", table, None) is table[default]


def test_an_unknown_name_is_refused_with_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"attention has no implementation 'pallas_gpu' \(backend: .*\); "
        r"use one of \['reference', 'xla'\]",
    ):
        choose("attention", TABLE, "pallas_gpu")


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_a_kernel_of_another_backend_is_refused(name):
    if jax.default_backend() == name:
        pytest.skip(f"this is a {name}")
    with pytest.raises(
        ValueError,
        match=rf"attention cannot run its implementation '{name}' on the backend '.*'; "
        rf"use '.*', or '{name}_interpret' to debug it",
    ):
        choose("attention", TABLE | {name: lambda: "kernel"}, name)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_every_backend_has_a_default(backend):
    assert default_implementation(backend) == DEFAULTS[backend]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"no default implementation is known .* 'quantum'"):
        default_implementation("quantum")
