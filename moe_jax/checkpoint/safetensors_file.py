"""Reading a safetensors file: the checked header, and single tensors by seek and read.

Knows no model: names and shapes are taken as they stand in the file. Files are not trusted: the
header is checked against the size of the file before anything is allocated for a tensor.

The format is an 8-byte little-endian header length, a JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, and the tensors without gaps
(https://huggingface.co/docs/safetensors). The `safetensors` library is not used for reading,
because it maps files into memory: mapped pages count as resident memory, so a loaded model would
count twice. It also has no bfloat16 for NumPy and its errors do not tell sizes.
"""

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float

MAX_HEADER_BYTES = 100_000_000  # the limit that the format's own library sets
BLOCK_BYTES = 1 << 26  # small enough that an interrupt is answered at once
SCRATCH_BYTES = 1 << 19  # stays in the processor's cache between reading and converting

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class StoredTensor(NamedTuple):
    """Where one tensor lies.

    Attributes:
      dtype: the format's name of the data type, for instance BF16.
      start: first byte, counted from the beginning of the file.
      size: bytes.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(file: Path) -> tuple[StoredTensor, ...]:
    """Reads and checks the header of a safetensors file, in the order of the data.

    Raises:
      ValueError: the file is missing, too short, has a broken header, tensors that overlap or
        leave gaps or do not fit their shape, or is truncated; the message names file and tensor.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing or not a file")
    with file.open("rb") as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        if file_bytes < 8:
            raise ValueError(
                f"{file} is truncated: a safetensors file begins with 8 bytes that hold the length "
                f"of its header, this file has {file_bytes} bytes"
            )
        header_bytes = int.from_bytes(stream.read(8), "little")
        limit = min(MAX_HEADER_BYTES, file_bytes - 8)
        if not 2 <= header_bytes <= limit:
            raise ValueError(
                f"{file} has a broken header: it claims a header of {header_bytes} bytes, expected "
                f"2 to {limit} in a file of {file_bytes} bytes; download or convert the file again"
            )
        header = _parse(file, stream.read(header_bytes))
    data_start = 8 + header_bytes
    header.pop("__metadata__", None)
    tensors = [_stored(file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            problem = "overlaps the one before it" if tensor.start < end else "leaves a gap"
            raise ValueError(
                f"{file}: the data of tensor {tensor.name!r} {problem}: it begins at byte "
                f"{tensor.start}, expected {end}"
            )
        end += tensor.size
    if end != file_bytes:
        problem = "is truncated" if end > file_bytes else "has bytes that belong to no tensor"
        raise ValueError(
            f"{file} {problem}: its header describes {end} bytes, the file has {file_bytes}; "
            "download or convert the file again"
        )
    return tuple(tensors)


def read_block(stream: FileIO, tensor: StoredTensor, skip: int, out: Float[np.ndarray, "..."]):
    """Fills `out` with consecutive elements of a tensor, converted to the dtype of `out`.

    Args:
      stream: the tensor's file, opened for binary reading without buffering.
      tensor: of a dtype in `DTYPES`.
      skip: elements of the tensor before the first one read.
      out: C-contiguous, any shape.

    Raises:
      ValueError: the file ends too early, since it was changed after its header was read.
    """
    stored, flat = DTYPES[tensor.dtype], out.reshape(-1)
    assert out.flags.c_contiguous, "the flat view would be a copy"
    stream.seek(tensor.start + skip * stored.itemsize)
    same = stored == out.dtype
    block = (BLOCK_BYTES if same else SCRATCH_BYTES) // stored.itemsize
    scratch = None if same else np.empty(min(block, flat.size), stored)
    for begin in range(0, flat.size, block):
        piece = flat[begin : begin + block]
        if scratch is None:
            _read_exactly(stream, tensor, piece.view(np.uint8))
        else:
            _read_exactly(stream, tensor, scratch[: piece.size].view(np.uint8))
            np.copyto(piece, scratch[: piece.size], casting="unsafe")


def _read_exactly(stream: FileIO, tensor: StoredTensor, out: np.ndarray) -> None:
    """Fills bytes; a single read may return fewer than asked for."""
    done = 0
    while done < out.size:
        count = stream.readinto(out.data[done:])
        if not count:
            raise ValueError(
                f"{tensor.file} ended inside tensor {tensor.name!r}: the file was truncated after "
                "its header was read"
            )
        done += count


def _parse(file: Path, text: bytes) -> dict[str, object]:
    """Parses the JSON header; the same name twice is an error."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} has a broken header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} has a broken header: expected a JSON object of tensors")
    return header


def _stored(file: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """Checks one entry of the header on its own."""
    where = f"{file} has a broken header: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} has unknown dtype {dtype!r}; known are {', '.join(_BITS)}")
    if not _counts(shape):
        raise ValueError(f"{where} has shape {_short(shape)}, expected whole numbers from 0")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {_short(offsets)}, expected [begin, end]")
    begin, end = offsets
    needed = -(-math.prod(shape) * _BITS[dtype] // 8)
    if end - begin != needed:
        raise ValueError(
            f"{where} of shape {shape} and dtype {dtype} has {end - begin} bytes, expected {needed}"
        )
    return StoredTensor(file, name, dtype, tuple(shape), data_start + begin, needed)


def _counts(value: object) -> bool:
    """Whether a JSON value is a short list of whole numbers from 0 that fit 64 bits."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _short(value: object) -> str:
    """A JSON value for an error message, cut where a hostile file makes it long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
