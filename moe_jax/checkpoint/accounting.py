"""Strict accounting: every checkpoint tensor has one use, every weight is filled exactly once.

Reads no file: it turns the tensors of the headers, the family's rules and the config into a list
of what to copy where, or says what does not add up.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moe_jax.checkpoint.safetensors_file import DTYPES, StoredTensor
from moe_jax.checkpoint.targets import Part, expected_targets, part_rows, parts_of
from moe_jax.config import ModelConfig
from moe_jax.families.rules import Rule, resolve

MAX_LISTED = 8


class Fill(NamedTuple):
    """One copy: consecutive elements of a tensor, from `skip` on, into rows of a target."""

    tensor: StoredTensor
    skip: int
    rows: slice


class _Use(NamedTuple):
    """A tensor that fills a part of a target; `expert` counts inside a tensor of all experts."""

    tensor: StoredTensor
    target: str
    part: Part | None
    expert: int | None


def listing(names: Iterable[str]) -> str:
    """Names for an error message: the first eight and how many more there are."""
    names = list(names)
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def plan_fills(
    tensors: Iterable[StoredTensor], rules: Sequence[Rule], config: ModelConfig, where: str
) -> dict[str, tuple[Fill, ...]]:
    """What to copy into each target, in loading order.

    Args:
      tensors: all tensors of the checkpoint; names are unique.
      rules: the family's names.
      config: the model; its targets are the ones to fill.
      where: begins every error about names, for instance the folder.

    Raises:
      ValueError: a tensor without a use, a target or a part of one that nothing fills or that is
        filled twice (all of these at once, each with names), a wrong shape, a dtype that is not
        F32, F16 or BF16.
    """
    shapes = expected_targets(config)
    slots: dict[tuple[str, Part | None], list[_Use]] = {
        (target, part): [] for target in shapes for part in parts_of(target) or (None,)
    }
    uses, unused = _uses(tensors, rules, config)
    for use in uses:
        wanted = [use.part] if use.part else parts_of(use.target) or (None,)
        if use.target not in shapes:
            unused.setdefault(use.tensor.name, f"there is no {use.target}")
        else:
            for part in wanted:
                slots[use.target, part].append(use)
    unfilled = [_slot_name(*slot) for slot, found in slots.items() if not found]
    twice = [
        f"{_slot_name(*slot)} ({', '.join(use.tensor.name for use in found)})"
        for slot, found in slots.items()
        if len(found) > 1
    ]
    useless = [f"{name} ({reason})" for name, reason in unused.items()]
    problems = [
        f"{len(names)} {text}: {listing(names)}"
        for names, text in (
            (useless, "checkpoint tensors have no use"),
            (unfilled, "weights are filled by no checkpoint tensor"),
            (twice, "weights are filled twice"),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{where} does not match its config.json: {'; '.join(problems)}")
    fills: dict[str, list[Fill]] = {target: [] for target in shapes}
    for use in uses:
        fills[use.target].append(_fill(use, shapes[use.target], config))
    return {target: tuple(found) for target, found in fills.items()}


def _uses(
    tensors: Iterable[StoredTensor], rules: Sequence[Rule], config: ModelConfig
) -> tuple[list[_Use], dict[str, str]]:
    """What each tensor is for, and why those have no use that no single rule claims."""
    uses: list[_Use] = []
    unused: dict[str, str] = {}
    for tensor in tensors:
        try:
            target, rule = resolve(tensor.name, rules)
        except ValueError as error:
            unused[tensor.name] = str(error)
            continue
        if rule.layout == "bank":
            for expert in range(config.moe.num_experts):
                name = target.replace("*", str(expert))
                uses.append(_Use(tensor, name, rule.part, expert))
        elif target:
            uses.append(_Use(tensor, target, rule.part, None))
    return uses, unused


def _slot_name(target: str, part: Part | None) -> str:
    return f"{target}[{part}]" if part else target


def _fill(use: _Use, target_shape: tuple[int, ...], config: ModelConfig) -> Fill:
    """Checks shape and dtype of one use."""
    tensor = use.tensor
    rows = part_rows(config, use.target, use.part)
    shape = (len(range(*rows.indices(target_shape[0]))), *target_shape[1:])
    expected = shape if use.expert is None else (config.moe.num_experts, *shape)
    if tensor.shape != expected:
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, config.json "
            f"asks for {list(expected)}"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}, supported are "
            f"{', '.join(DTYPES)}; convert a quantised checkpoint back first"
        )
    return Fill(tensor, (use.expert or 0) * math.prod(shape), rows)
