"""Kept calibrations are believed only if they are whole, for this machine, and possible."""

import json
import os
from pathlib import Path

import pytest

from host_offload.calibration import SIZES, Calibration, Curve
from host_offload.calibration_cache import cache_folder, file_name, machine_key, read, write

KEY = {"cpu": "one", "shapes": ((2, 3), (3, 1)), "cores": 2}
SECONDS = tuple(0.1 * size for size in SIZES)
CURVE = Curve(seconds=SECONDS, p90=SECONDS, measured=(True, False) * 5)
FOUND = Calibration(
    sizes=SIZES,
    host=CURVE,
    device=CURVE,
    work_bytes=1000,
    transfer=0.5,
    link_latency=0.0,
    host_launch=0.0,
    read_rate=1e9,
    spent=3.0,
)


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "new" / file_name(KEY)
    write(path, KEY, FOUND)
    return path


def change(path, **fields):
    """Sets fields of the file; `host__seconds` is a field of a field."""
    content = json.loads(path.read_text())
    for name, value in fields.items():
        *outer, last = name.split("__")
        place = content
        for part in outer:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(content))


def test_what_was_written_is_read(kept):
    assert read(kept, KEY) == FOUND
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]  # nothing is left aside


def test_a_file_that_is_not_there_is_no_error(tmp_path):
    assert read(tmp_path / "none.json", KEY) is None


def test_every_prefix_of_a_file_is_refused(kept):
    whole = kept.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        kept.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="it is not JSON, or not all of it"):
            read(kept, KEY)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfe", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b" " * 100_000, "more than 65536 bytes"),
        (b"[1, 2]", "holds no object"),
        (b"{}", "format is None, not 2"),
        (b'{"format": 1}', "format is 1, not 2"),
        (b'{"format": 2}', "does not say what it was measured on"),
    ],
)
def test_files_of_another_kind_are_refused(kept, content, message):
    kept.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(kept, KEY)


def test_a_folder_in_its_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no regular file"):
        read(tmp_path, KEY)


def test_a_calibration_of_something_else_is_refused_by_name(kept):
    with pytest.raises(ValueError, match="measured with cpu 'one', not 'two'"):
        read(kept, KEY | {"cpu": "two"})
    with pytest.raises(ValueError, match="measured with driver None, not 5"):
        read(kept, KEY | {"driver": 5})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("more", 1, "the file must have the fields"),
        ("calibration", [], "calibration must have the fields"),
        ("calibration__sizes", [1, 512], r"sizes holds \[1, 512\], not \[1, 2, 4, 8"),
        ("calibration__sizes", [2 * size for size in SIZES], r"sizes holds \[2, 4, 8"),
        ("calibration__sizes", None, "sizes holds None"),
        ("calibration__work_bytes", 0, "a whole number of at least 1"),
        ("calibration__work_bytes", 2.5, "a whole number of at least 1"),
        ("calibration__transfer", 0, "transfer holds 0"),
        ("calibration__transfer", "0.5", "transfer holds '0.5'"),
        ("calibration__read_rate", 10**400, "read_rate holds 1000"),
        ("calibration__read_rate", float("inf"), "read_rate holds inf"),
        ("calibration__host_launch", -1e-6, "host_launch holds -1e-06"),
        ("calibration__host__seconds", [0.1], "host.seconds is no list of 10 values"),
        ("calibration__host__seconds", SECONDS[::-1], "host.seconds falls"),
        ("calibration__host__seconds", [*SECONDS[:9], float("nan")], "host.seconds holds nan"),
        ("calibration__host__seconds", [0.0, *SECONDS[1:]], "host.seconds holds 0.0"),
        ("calibration__device__p90", [0.05, *SECONDS[1:]], "device.p90 lies below the median"),
        ("calibration__device__measured", [1] * 10, "something besides true and false"),
        ("calibration__device", {"seconds": []}, "device must have the fields"),
    ],
)
def test_numbers_that_cannot_be_are_refused(kept, field, value, message):
    change(kept, **{field: value})
    with pytest.raises(ValueError, match=message):
        read(kept, KEY)


def times(factor, curve=CURVE):
    return {
        "seconds": [factor * s for s in curve.seconds],
        "p90": [factor * s for s in curve.p90],
        "measured": curve.measured,
    }


@pytest.mark.parametrize(
    "field, value",
    [
        ("work_bytes", 1),
        ("read_rate", 1e12),
        ("host_launch", 100.0),
        ("link_latency", 1e-9),
        ("transfer", 0.4),
        ("spent", 2.0),
        ("device", times(1000)),
        ("device", times(0.001)),
        ("host__p90", [2 * s for s in SECONDS]),
        ("host__measured", [True] * 10),
    ],
)
def test_numbers_that_could_be_but_were_not_written_are_refused(kept, field, value):
    change(kept, **{f"calibration__{field}": value})
    with pytest.raises(ValueError, match="its SHA-256 is another"):
        read(kept, KEY)


def test_a_calibration_moved_into_the_file_of_another_machine_is_refused(kept):
    change(kept, key={**KEY, "cores": 4})
    with pytest.raises(ValueError, match="its SHA-256 is another"):
        read(kept, KEY | {"cores": 4})


@pytest.mark.parametrize("digest", [None, "", "0" * 64, 5])
def test_another_digest_is_refused(kept, digest):
    change(kept, sha256=digest)
    with pytest.raises(ValueError, match="its SHA-256 is another"):
        read(kept, KEY)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(kept, monkeypatch):
    before = kept.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(kept, KEY, FOUND)
    assert kept.read_bytes() == before
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_file_where_the_folder_should_be_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write(tmp_path / "file" / "a.json", KEY, FOUND)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"MOE_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/calibration"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/moe_jax/calibration"),
        ({"XDG_CACHE_HOME": "b", "HOME": "/h"}, "/h/.cache/moe_jax/calibration"),
        ({"MOE_JAX_CACHE": "", "HOME": "/h"}, "/h/.cache/moe_jax/calibration"),
        ({"MOE_JAX_CACHE": "~/c", "HOME": "/h"}, "/h/c/calibration"),
    ],
)
def test_the_folder_follows_the_environment(monkeypatch, variables, expected):
    for name in ("MOE_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_no_home_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.delenv("MOE_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="set MOE_JAX_CACHE"):
        cache_folder()


def test_the_machine_is_told_apart_by_what_changes_times(monkeypatch):
    key = machine_key()
    assert key["cores"] >= 1 and key["memory_gib"] > 0 and key["cpu"]
    assert json.loads(json.dumps(key)) == key
    monkeypatch.setenv("XLA_FLAGS", "--something")
    assert file_name(machine_key()) != file_name(key)
