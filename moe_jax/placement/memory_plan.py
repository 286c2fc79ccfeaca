"""What lives where: how a byte budget is divided between dense weights, KV, workspace and experts.

Pure arithmetic over sizes; nothing is allocated here.
"""

from dataclasses import dataclass

from host_offload.memory import format_bytes
from moe_jax.cache.paged_kv import PAGE_SIZE, kv_bytes_per_page, pages_for
from moe_jax.config import ModelConfig

LEAST_KV_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The division of device and host memory, in bytes.

    Attributes:
      device_bytes: the budget on the device.
      dense_bytes: embeddings, attention, norms, routers, shared experts.
      max_tokens: tokens in the KV cache, over all sequences.
      kv_pages, kv_bytes: its pages, with one more for each sequence's last that may be part full.
      workspace_bytes: activations of the largest step and two experts in transit.
      expert_bytes: one routed expert on the device; of experts that were cut, here and below, one
        piece.
      host_expert_bytes: one routed expert in host memory.
      slots: resident experts of each layer; 0 in dense layers.
      experts: experts of each layer; 0 in dense layers.
      host_bytes: the budget on the host.
    """

    device_bytes: int
    dense_bytes: int
    max_tokens: int
    kv_pages: int
    kv_bytes: int
    workspace_bytes: int
    expert_bytes: int
    host_expert_bytes: int
    slots: tuple[int, ...]
    experts: tuple[int, ...]
    host_bytes: int

    @property
    def resident_experts(self) -> int:
        """Experts on the device, over all layers."""
        return sum(self.slots)

    @property
    def host_experts(self) -> int:
        """Experts in host memory, over all layers."""
        return sum(self.experts) - self.resident_experts

    @property
    def device_bytes_used(self) -> int:
        """What the plan puts on the device."""
        fixed = self.dense_bytes + self.kv_bytes + self.workspace_bytes
        return fixed + self.resident_experts * self.expert_bytes

    @property
    def host_bytes_used(self) -> int:
        """What the plan leaves in host memory."""
        return self.host_experts * self.host_expert_bytes

    def __str__(self) -> str:
        used = [
            ("dense weights", self.dense_bytes, ""),
            ("KV cache", self.kv_bytes, f"{self.kv_pages * PAGE_SIZE} tokens"),
            ("workspace", self.workspace_bytes, ""),
            (
                "experts",
                self.resident_experts * self.expert_bytes,
                f"{self.resident_experts} of {sum(self.experts)}, {self._slots_text()}",
            ),
        ]
        lines = [
            f"device memory  {format_bytes(self.device_bytes_used):>11} "
            f"of {format_bytes(self.device_bytes)}"
        ]
        lines += [
            f"  {name:<13}{format_bytes(size):>11}  {note}".rstrip() for name, size, note in used
        ]
        host = self.host_bytes_used
        lines.append(f"host memory    {format_bytes(host):>11} of {format_bytes(self.host_bytes)}")
        each = format_bytes(self.host_expert_bytes)
        note = f"{self.host_experts} of {sum(self.experts)}, {each} each"
        lines.append(f"  {'experts':<13}{format_bytes(host):>11}  {note}")
        return "\n".join(lines)

    def _slots_text(self) -> str:
        counts = sorted({s for s, e in zip(self.slots, self.experts, strict=True) if e})
        span = [str(count) for count in dict.fromkeys((*counts[:1], *counts[-1:]))]
        return f"{'-'.join(span) or 'none'} per layer"


def plan_memory(
    config: ModelConfig,
    *,
    itemsize: int,
    host_expert_bytes: int | None = None,
    dense_bytes: int,
    device_bytes: int,
    host_bytes: int,
    max_tokens: int | None,
    max_seqs: int,
    largest_step: int,
) -> MemoryPlan:
    """Fills the device with dense weights, KV, workspace, then as many experts as fit.

    `largest_step` is the most tokens in one step; `host_expert_bytes` is None where experts are on
    the host as they are on the device. `max_tokens` is None for a KV cache of what all weights and
    the workspace leave, between LEAST_KV_TOKENS and the model's context for every sequence. Every
    layer gets the same number of slots; what is left over gives the first layers one more.

    Raises ValueError that says how many bytes are short if the fixed parts exceed the device budget
    or the other experts the host budget.
    """
    gate_up, down = config.expert_shapes
    expert_bytes = (gate_up[0] * gate_up[1] + down[0] * down[1]) * itemsize
    experts = tuple(config.moe.num_experts if moe else 0 for moe in config.moe_layers)
    moe_layers = sum(config.moe_layers)
    activations = _activation_bytes(config, itemsize, largest_step, max_seqs)
    if max_tokens is None:
        left = device_bytes - dense_bytes - activations - sum(experts) * expert_bytes
        pages = left // kv_bytes_per_page(config, itemsize) - max_seqs + 1
        most = max(config.max_positions * max_seqs, LEAST_KV_TOKENS)
        max_tokens = min(max(pages * PAGE_SIZE, LEAST_KV_TOKENS), most)
    # Each sequence may leave its last page unfilled; those pages come on top of max_tokens.
    kv_pages = pages_for(max_tokens) + max_seqs - 1
    kv_bytes = kv_pages * kv_bytes_per_page(config, itemsize)
    fixed = dense_bytes + kv_bytes

    def workspace(offloaded: bool) -> int:
        in_transit = 2 * expert_bytes if offloaded else 0
        return in_transit + activations

    everything = fixed + workspace(False) + sum(experts) * expert_bytes
    offloaded = everything > device_bytes
    fixed += workspace(offloaded)
    if fixed > device_bytes:
        raise ValueError(
            f"the device budget of {format_bytes(device_bytes)} is "
            f"{format_bytes(fixed - device_bytes)} short: dense weights need "
            f"{format_bytes(dense_bytes)}, a KV cache of {max_tokens} tokens "
            f"{format_bytes(kv_bytes)}, workspace {format_bytes(workspace(offloaded))}; "
            f"raise device_memory= to at least {fixed} bytes, or lower max_tokens= or max_seqs="
        )
    total_slots = sum(experts)
    if offloaded:
        total_slots = min(total_slots, (device_bytes - fixed) // expert_bytes)
    even, extra = divmod(total_slots, max(1, moe_layers))
    order = [index for index, moe in enumerate(config.moe_layers) if moe]
    slots = [0] * config.layers
    for rank, index in enumerate(order):
        slots[index] = even + (rank < extra)
    plan = MemoryPlan(
        device_bytes=device_bytes,
        dense_bytes=dense_bytes,
        max_tokens=max_tokens,
        kv_pages=kv_pages,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace(offloaded),
        expert_bytes=expert_bytes,
        host_expert_bytes=expert_bytes if host_expert_bytes is None else host_expert_bytes,
        slots=tuple(slots),
        experts=experts,
        host_bytes=host_bytes,
    )
    needed = plan.host_bytes_used
    if needed > host_bytes:
        raise ValueError(
            f"the host budget of {format_bytes(host_bytes)} is "
            f"{format_bytes(needed - host_bytes)} short: {plan.host_experts} experts of "
            f"{format_bytes(plan.host_expert_bytes)} do not fit on the device and need "
            f"{format_bytes(needed)}; raise host_memory= or device_memory="
        )
    return plan


def _activation_bytes(config: ModelConfig, itemsize: int, largest_step: int, max_seqs: int) -> int:
    """Activations of the largest step: hidden states, projections, expert rows, logits."""
    a = config.attention
    widths = 4 * config.embed + 2 * (a.qkv_width + a.heads * a.head_dim)
    expert_rows = largest_step * config.moe.experts_per_token
    inner = expert_rows * (2 * config.embed + 3 * config.moe.ffn)
    return largest_step * widths * itemsize + inner * itemsize + max_seqs * config.vocab * 4
