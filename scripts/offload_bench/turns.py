"""Lets ways take turns within a time, and keeps what each has told, line by line.

Knows names and seconds; nothing about what is measured.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from offload_bench.apart import Failure
from offload_bench.table import NOT_BEGUN, rate_text

# Gets a way's row, with one line more each time.
Seen = Callable[[dict[str, Any]], None]


def take_turns(
    ways: Sequence[str],
    extra: Collection[str],
    measure: Callable[[str, float | None, Seen], None],
    end: float,
    result: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Measures one way after the other, and fills the result.

    The first may take all the time, each later one its share or as long as the slowest before it.

    Args:
      extra: those that get what the others leave, and have no share before.
      measure: of a way, in so many seconds; raises Failure where not all of it came.
      end: on the monotonic clock; inf: never.
      result: its "rows" and "not_measured" get what came and what did not.
      write: called whenever the result has changed.
    """
    slowest, slowest_start = math.inf, 0.0
    for number, way in enumerate(ways):
        begun = time.monotonic()
        rows: list[dict[str, Any]] = []

        def seen(row: dict[str, Any], way=way, begun=begun, rows=rows) -> None:
            nonlocal slowest_start
            if rows:
                result["rows"].pop()
            else:
                slowest_start = max(slowest_start, time.monotonic() - begun)
            rows[:] = [row]
            result["rows"].append(row)
            line = list(row["tokens_per_second"])[-1]
            text = rate_text(row["tokens_per_second"][line], row["predicted"].get(line))
            print(f"{way}: {line}: {text} tokens/s", flush=True)
            write()

        try:
            left = end - begun
            if left <= slowest_start:
                raise Failure(NOT_BEGUN)
            sharing = [w for w in ways[number:] if way in extra or w not in extra]
            share = max(left / len(sharing), min(left, slowest))
            measure(way, None if math.isinf(share) else share, seen)
            spent = time.monotonic() - begun
            slowest = spent if math.isinf(slowest) else max(slowest, spent)
            print(f"{way}: {rows[0]['stats']}", flush=True)
        except Failure as failure:
            result["not_measured"].append({"way": way, "reason": str(failure)})
            print(f"{way}: {'not all of it' if rows else 'not'} measured: {failure}", flush=True)
        write()
