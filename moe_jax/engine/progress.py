"""Progress bars, one style everywhere."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from moe_jax.engine.handle import Handle


def progress_bar(total: int, description: str, unit: str, shown: bool) -> tqdm:
    """A bar on standard error that leaves nothing behind when it is done or not shown."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        leave=False,
        disable=not shown,
        file=sys.stderr,
    )


class RequestProgress:
    """How many of some requests are done, with their tokens per second so far."""

    def __init__(self, handles: Sequence[Handle], shown: bool):
        self._handles = handles
        self._bar = progress_bar(len(handles), "generate", "request", shown)
        self._started = time.perf_counter()

    def update(self) -> None:
        """Shows the state after a step."""
        if self._bar.disable:
            return
        seconds = time.perf_counter() - self._started
        read = sum(one.prompt_tokens for one in self._handles if one.generated_tokens)
        written = sum(one.generated_tokens for one in self._handles)
        self._bar.set_postfix_str(
            f"input {read / seconds:.0f} tokens/s, output {written / seconds:.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(sum(one.done for one in self._handles) - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
