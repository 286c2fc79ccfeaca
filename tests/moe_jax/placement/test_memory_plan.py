"""How a budget is divided."""

from dataclasses import replace

import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.placement.memory_plan import LEAST_KV_TOKENS, plan_memory

CONFIG = ModelConfig(
    family="mixtral",
    vocab=100,
    embed=32,
    dense_ffn=64,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
    moe=MoEConfig(num_experts=4, experts_per_token=2, ffn=64),
    rope=RopeConfig(),
    moe_layers=(True, False, True, True),
    windows=(None,) * 4,
    max_positions=128,
)
EXPERT = 3 * 32 * 64 * 2


def plan(device_bytes=1 << 40, host_bytes=1 << 40, config=CONFIG, max_tokens=64):
    return plan_memory(
        config,
        itemsize=2,
        dense_bytes=50_000,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        max_tokens=max_tokens,
        max_seqs=2,
        largest_step=32,
    )


def test_everything_resident_where_it_fits():
    whole = plan()
    assert whole.slots == (4, 0, 4, 4)
    assert whole.host_experts == 0
    assert plan(whole.device_bytes_used).slots == whole.slots


@pytest.mark.parametrize("resident", range(0, 12))
def test_budget_buys_experts_evenly(resident):
    whole = plan()
    fixed = whole.device_bytes_used - 12 * EXPERT + 2 * EXPERT  # two experts in transit
    budget = fixed + resident * EXPERT
    if budget >= whole.device_bytes_used:
        return
    split = plan(budget)
    assert split.resident_experts == resident
    assert split.device_bytes_used <= budget
    used = [s for s, e in zip(split.slots, split.experts, strict=True) if e]
    assert max(used) - min(used) <= 1
    assert split.slots[1] == 0


def test_short_device_budget_says_by_how_much():
    smallest = plan(plan().device_bytes_used - 9 * EXPERT)
    minimum = smallest.device_bytes_used - smallest.resident_experts * EXPERT
    assert plan(minimum).resident_experts == 0
    with pytest.raises(ValueError, match=r"is 1 B short: dense weights need 48\.83 KiB") as error:
        plan(minimum - 1)
    assert f"raise device_memory= to at least {minimum} bytes" in str(error.value)


def test_short_host_budget_says_by_how_much():
    budget = plan().device_bytes_used - 4 * EXPERT
    with pytest.raises(ValueError, match=r"the host budget of 100 B is .* short: \d+ experts"):
        plan(budget, host_bytes=100)


def test_dense_only_model_has_no_experts():
    dense = replace(CONFIG, moe_layers=(False,) * 4)
    assert plan(config=dense).resident_experts == 0
    assert "0 of 0" in str(plan(config=dense))


def test_plan_prints_every_part():
    text = str(plan())
    for part in ("device memory", "dense weights", "KV cache", "workspace", "experts", "host"):
        assert part in text
    assert "12 of 12, 4 per layer" in text


def test_the_kv_cache_takes_what_weights_and_workspace_leave():
    config = replace(CONFIG, max_positions=1 << 20)
    least = plan(config=config, max_tokens=LEAST_KV_TOKENS)
    budget = least.device_bytes_used + 7 * least.kv_bytes // least.kv_pages
    left = plan(budget, config=config, max_tokens=None)
    assert left.max_tokens == LEAST_KV_TOKENS + 7 * 16
    assert left.device_bytes_used <= budget
    assert left.host_experts == 0
    assert f"{left.kv_pages * 16} tokens" in str(left)


@pytest.mark.parametrize(
    "device_bytes, positions, tokens",
    [
        (1 << 40, 10_000, 20_000),
        (1 << 40, 128, LEAST_KV_TOKENS),
        (1_300_000, 10_000, LEAST_KV_TOKENS),
    ],
    ids=["context_of_every_sequence", "short_context", "experts_do_not_fit"],
)
def test_it_takes_no_more_than_is_of_use_and_no_less_than_it_needs(device_bytes, positions, tokens):
    config = replace(CONFIG, max_positions=positions)
    assert plan(device_bytes, config=config, max_tokens=None).max_tokens == tokens
