"""Asks a kernel which tiles it would use for given arguments, and what else could be tried.

Knows that a kernel's module has `choose_tiles` and looks its key up with `find_tiles`; not what
the key or the tiles look like.
"""

import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from kernel_bench.cases import Arrays, Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a kernel does with a case.

    Attributes:
      key: what its table calls the case.
      tiles: those it uses now.
      measured: whether they come from a table of this kind of device.
      run: the kernel with tiles and the arrays of a call as keywords; gives the result only.
    """

    key: str
    tiles: Any
    measured: bool
    run: Callable[..., jax.Array]


def plan(case: Case, arrays: Arrays, implementation: str, interpret: bool = False) -> Plan:
    """Returns the plan of one kernel, by tracing it and listening to what it looks up.

    Raises:
      ValueError: the kernel cannot do this case.
    """
    module = importlib.import_module(f"pallas_kernels.{case.operation}.{implementation}")
    kernel = getattr(module, f"{case.operation}_{implementation}")
    options = dict(case.options) | ({"interpret": True} if interpret else {})

    def run(tiles: Any, **arguments: Any) -> jax.Array:
        result = kernel(**arguments, **options, tiles=tiles)
        return result[0] if isinstance(result, tuple) else result

    keys: list[str] = []
    chosen: list[tuple[Any, bool]] = []
    looks_up = sys.modules[module.choose_tiles.__module__]
    find, choose = looks_up.find_tiles, module.choose_tiles

    def heard_find(operation: str, name: str, key: str, *rest: Any) -> Any:
        keys.append(key)
        return find(operation, name, key, *rest)

    def heard_choose(*positional: Any, **named: Any) -> tuple[Any, bool]:
        chosen.append(choose(*positional, **named))
        return chosen[-1]

    with (
        mock.patch.object(looks_up, "find_tiles", heard_find),
        mock.patch.object(module, "choose_tiles", heard_choose),
    ):
        jax.eval_shape(lambda shared, call: run(None, **shared, **call), arrays[0], arrays[1][0])
    tiles, measured = chosen[0]
    return Plan(key=keys[0], tiles=tiles, measured=measured, run=run)


def neighbours(tiles: Any, fields: int) -> Iterator[Any]:
    """Yields tiles in which `fields` sizes are doubled or halved (stages: one more or less).

    What a kernel refuses when it is asked is not filtered; what its Tiles refuse is left out.
    """
    values = vars(tiles)
    for names in itertools.combinations(values, fields):
        for signs in itertools.product((1, -1), repeat=fields):
            steps = zip(names, signs, strict=True)
            changed = {name: _step(name, values[name], sign) for name, sign in steps}
            if min(changed.values()) < 1:
                continue
            try:
                yield dataclasses.replace(tiles, **changed)
            except ValueError:  # no multiple of what the hardware wants
                continue


def _step(name: str, value: int, sign: int) -> int:
    if name == "stages":
        return value + sign
    return value * 2 if sign > 0 else value // 2
