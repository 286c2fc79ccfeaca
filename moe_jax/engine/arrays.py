"""Puts arrays where a model is served from, by the names checkpoints know them under, and back."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Int

from host_offload.memory import sharding, zeros
from moe_jax.checkpoint.placing import place
from moe_jax.config import ModelConfig
from moe_jax.engine.cut import cut_array, join_arrays
from moe_jax.engine.quantize import store_rows_in_int8
from moe_jax.engine.runner import ServedModel
from moe_jax.engine.swap import store_in_bank
from moe_jax.model.compiled import ServedLayer
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts
from moe_jax.model.int8 import Int8Expert
from moe_jax.model.programs import Programs
from moe_jax.model.weights import LayerWeights
from moe_jax.placement.curves import CostCurves

_EXPERT = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.(gate_up|down)(?:_scale)?")


class ArrayReceiver:
    """Collects a checkpoint's arrays and builds the model from them.

    `slot_expert` names the resident experts of every layer, in the order of their slots. On the
    CPU backend they stay separate arrays, because it reads those in place and would copy out of a
    bank; elsewhere they are written into the layer's bank one by one, so there is never a second
    copy of them all. With the host dtype "int8" the others are rounded to it as they arrive.
    Experts that the config has cut arrive whole, in host memory, and are cut here.

    The others go to the pinned host memory of `host`; None: the first device's.
    """

    def __init__(
        self,
        config: ModelConfig,
        slot_expert: Sequence[Int[np.ndarray, " _slots"]],
        dtype: jnp.dtype,
        host_dtype: str | None = None,
        host: jax.Device | None = None,
    ):
        self._config, self._dtype, self._host_dtype = config, dtype, host_dtype
        self._host = host
        self._residents = [experts.tolist() for experts in slot_expert]
        self._use_bank = jax.default_backend() != "cpu"
        self._arrays: dict[str, jax.Array] = {}
        self._banks: dict[tuple[int, str], jax.Array] = {}

    def sharding(self, target: str) -> Sharding:
        """Where the array of this name is to be put; experts to be cut go to host memory."""
        if _EXPERT.fullmatch(target) and self._config.moe.pieces > 1:
            return sharding("pinned_host", self._host)
        return self._home(target)

    def _home(self, target: str) -> Sharding:
        match = _EXPERT.fullmatch(target)
        if match and int(match[2]) not in self._residents[int(match[1])]:
            return sharding("pinned_host", self._host)
        return sharding("device")

    def receive(self, target: str, array: jax.Array) -> None:
        """Takes one array of a checkpoint."""
        match, pieces = _EXPERT.fullmatch(target), self._config.moe.pieces
        if not match or pieces == 1:
            self._store(target, array)
            return
        for index, piece in enumerate(cut_array(match[3], np.asarray(array), pieces)):
            name = f"layers.{match[1]}.experts.{int(match[2]) * pieces + index}.{match[3]}"
            self._store(name, place(piece, self._home(name)))

    def _store(self, target: str, array: jax.Array) -> None:
        match = _EXPERT.fullmatch(target)
        residents = self._residents[int(match[1])] if match else []
        if match and int(match[2]) not in residents and self._host_dtype is not None:
            self._arrays[target], self._arrays[f"{target}_scale"] = store_rows_in_int8(array)
            return
        if not self._use_bank or not match or int(match[2]) not in residents:
            self._arrays[target] = array
            return
        key = int(match[1]), match[3]
        if key not in self._banks:
            self._banks[key] = zeros((len(residents), *array.shape), self._dtype, "device")
        slot = residents.index(int(match[2]))
        self._banks[key] = store_in_bank(self._banks[key], array, slot)

    def build(self, programs: Programs, curves: CostCurves) -> ServedModel:
        """The model, once every array is here."""
        layers = []
        for index in range(self._config.layers):
            parameters = _nest(
                {
                    name.removeprefix(f"layers.{index}."): array
                    for name, array in self._arrays.items()
                    if name.startswith(f"layers.{index}.") and not _EXPERT.fullmatch(name)
                }
            )
            graph = _layer_graph(self._config, index, self._dtype)
            program = programs.layer(graph, self._config.windows[index])
            layers.append(ServedLayer(parameters, self._experts(index), program))
        embedding = self._arrays["embedding"]
        return ServedModel(
            config=self._config,
            embedding=embedding,
            layers=tuple(layers),
            final_norm=self._arrays["final_norm"],
            unembedding=self._arrays.get("unembedding", embedding),
            curves=curves,
            dtype=self._dtype,
        )

    def _experts(self, layer: int) -> LayerExperts | None:
        if not self._config.moe_layers[layer]:
            return None
        residents = self._residents[layer]
        missing = [e for e in range(self._config.moe.num_experts) if e not in residents]
        at = lambda e, part: self._arrays[f"layers.{layer}.experts.{e}.{part}"]
        collect = lambda kind, ids: tuple(
            kind(*(at(e, part) for part in kind._fields)) for e in ids
        )
        if self._use_bank and residents:
            resident = ExpertBank(self._banks[layer, "gate_up"], self._banks[layer, "down"])
        else:
            resident = collect(Expert, residents)
        address = np.argsort(residents + missing).astype(np.int32)
        return LayerExperts(
            resident=resident,
            host=collect(Int8Expert if self._host_dtype else Expert, missing),
            address=jax.device_put(address, sharding("device")),
        )


class _Arrays(Mapping[str, jax.Array]):
    """Arrays by checkpoint name; what was cut is joined when it is asked for."""

    def __init__(self, parts: Mapping[str, Sequence[jax.Array]]):
        self._parts = parts

    def __getitem__(self, name: str) -> jax.Array:
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0]
        joined = join_arrays(name.rpartition(".")[2], [np.asarray(part) for part in parts])
        return jax.device_put(joined, sharding("pinned_host"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def arrays_by_target(model: ServedModel) -> Mapping[str, jax.Array]:
    """Every array of a served model under its checkpoint name."""
    arrays = {"embedding": model.embedding, "final_norm": model.final_norm}
    if not model.config.tied_embeddings:
        arrays["unembedding"] = model.unembedding
    cut: dict[str, list[jax.Array]] = defaultdict(list)
    for index, layer in enumerate(model.layers):
        arrays |= {f"layers.{index}.{k}": v for k, v in _flatten(layer.parameters).items()}
        if layer.experts is None:
            continue
        experts = layer.experts
        for expert, address in enumerate(np.asarray(experts.address).tolist()):
            if address >= experts.slots:
                pair = experts.host[address - experts.slots]
                if isinstance(pair, Int8Expert):
                    raise ValueError(
                        "a model whose host experts were rounded to int8 cannot be saved; load it "
                        "without host_dtype= to save it"
                    )
            elif isinstance(experts.resident, ExpertBank):
                pair = Expert(*(bank[address] for bank in experts.resident))
            else:
                pair = experts.resident[address]
            name = f"layers.{index}.experts.{expert // model.config.moe.pieces}"
            cut[f"{name}.gate_up"].append(pair.gate_up)
            cut[f"{name}.down"].append(pair.down)
    return _Arrays({name: [array] for name, array in arrays.items()} | cut)


def _layer_graph(config: ModelConfig, layer: int, dtype: jnp.dtype) -> nnx.GraphDef:
    abstract = nnx.eval_shape(lambda: LayerWeights(config, layer, dtype))
    return nnx.split(abstract)[0]


def _nest(flat: dict[str, jax.Array]) -> dict:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: dict = defaultdict(dict)
    groups: dict[str, dict] = defaultdict(dict)
    for name, array in flat.items():
        head, _, rest = name.partition(".")
        if rest:
            groups[head][rest] = array
        else:
            tree[head] = array
    return dict(tree) | {head: _nest(group) for head, group in groups.items()}


def _flatten(tree: dict) -> dict[str, jax.Array]:
    """{"a": {"b": x}} -> {"a.b": x}."""
    flat = {}
    for head, value in tree.items():
        nested = _flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{head}.{rest}" if rest else head: array for rest, array in nested.items()}
    return flat
