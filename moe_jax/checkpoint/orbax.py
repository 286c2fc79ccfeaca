"""Our own folder: weights in Orbax parts, the config and tokenizer files, and a marker.

Knows no tensor names of other formats: arrays are saved under their target names and restored
straight into the sharding, and so the memory kind, that is asked for.

    FOLDER/moe_jax_checkpoint.json   format, version, dtype; per part its arrays and files
    FOLDER/weights/00000 ...         Orbax checkpoints of about 256 MiB
    FOLDER/config.json tokenizer.json ...

Several parts, because one Orbax restore holds twice what it restores, and one checkpoint of ten
thousand arrays reads its whole catalogue for every group of arrays restored from it.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from host_offload.interrupts import hold_interrupts
from moe_jax.checkpoint.accounting import listing
from moe_jax.checkpoint.json_file import read_json_object
from moe_jax.checkpoint.marker import (
    MARKER,
    Part,
    check_contents,
    list_files,
    part_folder,
    read_marker,
    write_marker,
)
from moe_jax.checkpoint.placing import loading_bar
from moe_jax.checkpoint.targets import expected_targets, target_bytes
from moe_jax.checkpoint.whole_folder import check_free, whole_folder
from moe_jax.config import ModelConfig
from moe_jax.families import read_config

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
PART_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class OrbaxCheckpoint:
    """A folder written by `save_checkpoint`; see `moe_jax.checkpoint.Checkpoint`."""

    folder: Path
    raw_config: Mapping[str, object]
    config: ModelConfig
    parts: tuple[Part, ...] = field(repr=False)

    def weight_bytes(self, dtype: DTypeLike) -> int:
        """Bytes of all arrays once loaded in this dtype."""
        return target_bytes(self.config, jnp.dtype(dtype))

    def load(
        self,
        dtype: DTypeLike,
        sharding: Callable[[str], jax.sharding.Sharding],
        receive: Callable[[str, jax.Array], None],
        progress: bool = False,
    ) -> None:
        """Restores the weights part by part; see `moe_jax.checkpoint.Checkpoint.load`."""
        dtype = jnp.dtype(dtype)
        with loading_bar(self.weight_bytes(dtype), progress) as bar:
            for number, part in enumerate(self.parts):
                folder = self.folder / part_folder(number)
                # Orbax itself restores a damaged array without a word.
                check_contents(folder, part)
                wanted = {
                    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(name))
                    for name, shape in part.arrays.items()
                }
                # Interrupted, Orbax goes on reading in threads of its own.
                with hold_interrupts(), ocp.StandardCheckpointer() as checkpointer:
                    arrays = checkpointer.restore(folder.resolve(), wanted)
                for name in part.arrays:
                    array = arrays.pop(name)
                    bar.update(array.nbytes)
                    receive(name, array)


def open_orbax(folder: Path) -> OrbaxCheckpoint:
    """Reads config and marker of a folder and checks that every part is there.

    Raises:
      ValueError: marker or config is missing or broken, the format is newer than this library, a
        file is missing or has another size, or the arrays are not those of the config.
    """
    parts = read_marker(folder)
    raw_config = read_json_object(folder / "config.json")
    config = read_config(raw_config)
    found = {name: shape for part in parts for name, shape in part.arrays.items()}
    if len(found) != sum(len(part.arrays) for part in parts):
        raise ValueError(f"{folder / MARKER} is broken: an array lies in two parts")
    expected = expected_targets(config)
    _check_names(f"the arrays in {folder / MARKER}", set(found), set(expected))
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{folder / MARKER}: {name} has shape {list(found[name])}, config.json asks for "
                f"{list(shape)}"
            )
    return OrbaxCheckpoint(folder=folder, raw_config=raw_config, config=config, parts=parts)


def save_checkpoint(folder: Path, arrays: Mapping[str, jax.Array], source: Path) -> None:
    """Writes all arrays of a model, and the config and tokenizer files of `source`.

    The folder appears when everything is on the disk; an error or an interrupt leaves nothing.

    Args:
      folder: new or empty; its parent exists.
      arrays: every target of `source`'s config by name, in any memory kind and all of one dtype.
        Looked up once each, in loading order, so a lazy mapping need not hold them all.
      source: the folder the model was loaded from.

    Raises:
      ValueError: the folder is not free, or the arrays are not those of the config.
    """
    check_free(folder)
    shapes = expected_targets(read_config(read_json_object(source / "config.json")))
    _check_names(f"the arrays to save to {folder}", set(arrays), set(shapes))
    with whole_folder(folder) as aside:
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        parts: list[Part] = []
        pending: dict[str, jax.Array] = {}
        pending_bytes, dtype = 0, None
        for name, shape in shapes.items():
            array = arrays[name]
            dtype = dtype or array.dtype
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"cannot save {name}: it is {array.dtype}{list(array.shape)}, expected "
                    f"{dtype}{list(shape)}"
                )
            if pending and pending_bytes + array.nbytes > PART_BYTES:
                parts.append(_save_part(aside / part_folder(len(parts)), pending))
                pending, pending_bytes = {}, 0
            pending[name] = array
            pending_bytes += array.nbytes
        parts.append(_save_part(aside / part_folder(len(parts)), pending))
        write_marker(aside, str(dtype), parts)


def _save_part(folder: Path, arrays: dict[str, jax.Array]) -> Part:
    """Writes one Orbax checkpoint and lists what it consists of."""
    # Interrupted, Orbax goes on writing in threads of its own while its caller cleans up.
    with hold_interrupts(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, arrays)
        checkpointer.wait_until_finished()
    return Part({name: array.shape for name, array in arrays.items()}, list_files(folder))


def _check_names(where: str, found: set[str], expected: set[str]) -> None:
    """Raises unless the arrays are exactly those of the config."""
    problems = [
        f"{text} {listing(sorted(names))}"
        for text, names in (("lacking", expected - found), ("not asked for", found - expected))
        if names
    ]
    if problems:
        raise ValueError(f"{where} are not those of config.json: {'; '.join(problems)}")
