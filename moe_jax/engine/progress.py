"""Progress bars, one style everywhere."""

import sys

from tqdm import tqdm


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
