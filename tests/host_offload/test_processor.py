"""What the operating system tells about the processor."""

import pytest

from host_offload import processor

CPUINFO = """processor\t: 0
model name\t: Fast Processor 1000
model\t\t: 167
flags\t\t: fpu avx2 {flags} avx512_vnni

processor\t: 1
model name\t: Fast Processor 1000
flags\t\t: fpu
"""


@pytest.fixture
def describe(tmp_path, monkeypatch):
    def write(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        monkeypatch.setattr(processor, "_CPUINFO", path)

    forget()
    yield write
    forget()


def forget():
    for known in (
        processor.has_matrix_units,
        processor.has_wide_vectors,
        processor.multiplies_bfloat16,
        processor.processor_name,
    ):
        known.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("amx_bf16 amx_tile amx_int8", True), ("amx_bf16 amx_tile", False), ("", False)],
)
def test_matrix_units_take_bfloat16_and_int8(describe, flags, expected):
    describe(CPUINFO.format(flags=flags))
    assert processor.has_matrix_units() is expected


@pytest.mark.parametrize(("flags", "expected"), [("avx512f", True), ("avx512vl", False)])
def test_wide_vectors_are_those_of_avx_512(describe, flags, expected):
    describe(CPUINFO.format(flags=flags))
    assert processor.has_wide_vectors() is expected


@pytest.mark.parametrize(("flags", "expected"), [("avx512_bf16", True), ("avx512f", False)])
def test_vectors_of_bfloat16_have_a_flag(describe, flags, expected):
    describe(CPUINFO.format(flags=flags))
    assert processor.multiplies_bfloat16() is expected


def test_the_name_is_the_models(describe):
    describe(CPUINFO)
    assert processor.processor_name() == "Fast Processor 1000"


def test_where_nothing_tells_there_are_no_units(describe, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert not processor.has_matrix_units()
    assert not processor.has_wide_vectors()
    assert not processor.multiplies_bfloat16()
    assert processor.processor_name()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "without AVX-512 and AMX as far as is known"),
        ("avx512f avx512_bf16", "AVX-512, products of bfloat16"),
        ("avx512f avx512_bf16 amx_bf16 amx_int8", "AVX-512, products of bfloat16, AMX"),
    ],
)
def test_a_description_names_the_units_there_are(describe, flags, expected):
    describe(CPUINFO.format(flags=flags))
    assert processor.describe_processor() == f"Fast Processor 1000, {expected}"
