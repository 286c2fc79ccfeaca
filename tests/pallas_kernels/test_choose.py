import pytest

from pallas_kernels.choose import DEFAULTS, choose, default_implementation

TABLE = {"reference": lambda: "plain", "xla": lambda: "fast"}


def test_a_name_selects_its_implementation():
    assert choose("attention", TABLE, "reference") is TABLE["reference"]


def test_none_selects_the_default_of_the_backend():
    assert choose("attention", TABLE, None) is TABLE["xla"]


def test_an_unknown_name_is_refused_with_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"attention has no implementation 'pallas_gpu' \(backend: .*\); "
        r"use one of \['reference', 'xla'\]",
    ):
        choose("attention", TABLE, "pallas_gpu")


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_every_backend_has_a_default(backend):
    assert default_implementation(backend) == DEFAULTS[backend]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"no default implementation is known .* 'quantum'"):
        default_implementation("quantum")
