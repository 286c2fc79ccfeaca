"""Puts arrays where a model is served from, by the names checkpoints know them under, and back."""

import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from host_offload.memory import sharding, zeros
from moe_jax.config import ModelConfig
from moe_jax.engine.runner import ServedModel
from moe_jax.engine.swap import store_in_bank
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts
from moe_jax.model.programs import Programs, ServedLayer
from moe_jax.model.weights import LayerWeights
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.memory_plan import MemoryPlan

_EXPERT = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.(gate_up|down)")


class ArrayReceiver:
    """Collects a checkpoint's arrays and builds the model from them.

    The first experts of every layer are the resident ones. On the CPU backend they stay separate
    arrays, because it reads those in place and would copy out of a bank; elsewhere they are
    written into the layer's bank one by one, so there is never a second copy of them all.
    """

    def __init__(self, config: ModelConfig, plan: MemoryPlan, dtype: jnp.dtype):
        self._config, self._plan, self._dtype = config, plan, dtype
        self._use_bank = jax.default_backend() != "cpu"
        self._arrays: dict[str, jax.Array] = {}
        self._banks: dict[tuple[int, str], jax.Array] = {}

    def sharding(self, target: str) -> Sharding:
        """Where the array of this name goes."""
        match = _EXPERT.fullmatch(target)
        if match and int(match[2]) >= self._plan.slots[int(match[1])]:
            return sharding("pinned_host")
        return sharding("device")

    def receive(self, target: str, array: jax.Array) -> None:
        """Takes one array."""
        match = _EXPERT.fullmatch(target)
        slot = int(match[2]) if match else 0
        if not self._use_bank or not match or slot >= self._plan.slots[int(match[1])]:
            self._arrays[target] = array
            return
        key = int(match[1]), match[3]
        if key not in self._banks:
            shape = (self._plan.slots[key[0]], *array.shape)
            self._banks[key] = zeros(shape, self._dtype, "device")
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
        count, slots = self._config.moe.num_experts, self._plan.slots[layer]
        at = lambda e, part: self._arrays[f"layers.{layer}.experts.{e}.{part}"]
        separate = lambda ids: tuple(Expert(at(e, "gate_up"), at(e, "down")) for e in ids)
        if self._use_bank and slots:
            resident = ExpertBank(self._banks[layer, "gate_up"], self._banks[layer, "down"])
        else:
            resident = separate(range(slots))
        return LayerExperts(
            resident=resident,
            host=separate(range(slots, count)),
            address=jax.device_put(np.arange(count, dtype=np.int32), sharding("device")),
        )


def arrays_by_target(model: ServedModel) -> dict[str, jax.Array]:
    """Every array of a served model under its checkpoint name."""
    arrays = {"embedding": model.embedding, "final_norm": model.final_norm}
    if not model.config.tied_embeddings:
        arrays["unembedding"] = model.unembedding
    for index, layer in enumerate(model.layers):
        arrays |= {f"layers.{index}.{k}": v for k, v in _flatten(layer.parameters).items()}
        if layer.experts is None:
            continue
        experts = layer.experts
        for expert, address in enumerate(np.asarray(experts.address).tolist()):
            if address >= experts.slots:
                pair = experts.host[address - experts.slots]
            elif isinstance(experts.resident, ExpertBank):
                pair = Expert(*(bank[address] for bank in experts.resident))
            else:
                pair = experts.resident[address]
            name = f"layers.{index}.experts.{expert}"
            arrays |= {f"{name}.gate_up": pair.gate_up, f"{name}.down": pair.down}
    return arrays


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
