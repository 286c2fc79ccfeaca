"""A Hugging Face folder: config.json and safetensors, in one file or sharded with an index.

Knows no family: names come as rules. Everything is checked before a weight is read; then one
target at a time is assembled and handed over, so that there are never two copies of the model.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from moe_jax.checkpoint.accounting import Fill, listing, plan_fills
from moe_jax.checkpoint.json_file import read_json_object
from moe_jax.checkpoint.placing import aligned_buffer, loading_bar, place
from moe_jax.checkpoint.safetensors_file import StoredTensor, read_block, read_header
from moe_jax.checkpoint.targets import expected_targets, target_bytes
from moe_jax.config import ModelConfig
from moe_jax.families import read_config, tensor_rules

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceCheckpoint:
    """A folder whose tensors have been accounted for; see `moe_jax.checkpoint.Checkpoint`."""

    folder: Path
    raw_config: Mapping[str, object]
    config: ModelConfig
    fills: Mapping[str, tuple[Fill, ...]] = field(repr=False)

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
        """Reads the weights one by one; see `moe_jax.checkpoint.Checkpoint.load`."""
        dtype = jnp.dtype(dtype)
        shapes = expected_targets(self.config)
        files = {fill.tensor.file for fills in self.fills.values() for fill in fills}
        with ExitStack() as stack:
            # A buffered stream would copy every byte once more.
            streams = {
                file: stack.enter_context(file.open("rb", buffering=0)) for file in sorted(files)
            }
            bar = stack.enter_context(loading_bar(self.weight_bytes(dtype), progress))
            for target, fills in self.fills.items():
                array = place(_assemble(shapes[target], dtype, fills, streams), sharding(target))
                bar.update(array.nbytes)
                receive(target, array)


def open_hugging_face(folder: Path) -> HuggingFaceCheckpoint:
    """Reads config.json and all headers of a folder and accounts for every tensor.

    Raises:
      ValueError: config.json is missing or refused by its family; there are no safetensors; a
        shard is missing, broken or truncated; index and shards disagree; tensors and weights do
        not match (see `plan_fills`).
    """
    raw_config = read_json_object(folder / "config.json")
    config = read_config(raw_config)
    fills = plan_fills(
        _tensors(folder), tensor_rules(config.family, config.tied_embeddings), config, str(folder)
    )
    return HuggingFaceCheckpoint(folder=folder, raw_config=raw_config, config=config, fills=fills)


def _assemble(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    fills: tuple[Fill, ...],
    streams: Mapping[Path, FileIO],
) -> Float[np.ndarray, "..."]:
    """Reads all parts of one target into a new buffer."""
    buffer = aligned_buffer(shape, dtype)
    for fill in fills:
        read_block(streams[fill.tensor.file], fill.tensor, fill.skip, buffer[fill.rows])
    return buffer


def _tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of a folder; a single file goes before an index, as in Transformers."""
    if (folder / SINGLE).is_file():
        return list(read_header(folder / SINGLE))
    if (folder / INDEX).is_file():
        return _sharded_tensors(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} has its weights only as pickle files ({listing(pickles)}), which can run "
            "code when read and are refused; convert them to safetensors first, for instance with "
            "save_pretrained of a current Transformers"
        )
    raise ValueError(f"{folder} has no weights: looked for {SINGLE} and {INDEX}")


def _sharded_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of all shards, which must be exactly those of the index."""
    index = folder / INDEX
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} needs a weight_map that is an object and not empty")
    shards: dict[str, set[str]] = {}
    for tensor, shard in names.items():
        # Anything but a plain file name could point out of the folder.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise ValueError(
                f"{index} puts tensor {tensor!r} into {shard!r}; a shard must be the name of a "
                "file in the same folder"
            )
        shards.setdefault(shard, set()).add(tensor)
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards its index names: "
            f"{listing(missing)}; download them again"
        )
    tensors: list[StoredTensor] = []
    for shard, expected in sorted(shards.items()):
        found = read_header(folder / shard)
        _check_same_names(index, folder / shard, expected, {tensor.name for tensor in found})
        tensors.extend(found)
    return tensors


def _check_same_names(index: Path, shard: Path, expected: set[str], found: set[str]) -> None:
    """Raises unless a shard holds exactly the tensors that the index puts there."""
    lacking, extra = sorted(expected - found), sorted(found - expected)
    if lacking:
        raise ValueError(f"{shard} lacks tensors that {index.name} puts there: {listing(lacking)}")
    if extra:
        raise ValueError(f"{shard} has tensors that {index.name} does not name: {listing(extra)}")
