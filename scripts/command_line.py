"""What scripts share: checks of their options, and how they end.

Knows nothing of what the scripts do.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process as `main` returns, or with code 1 at an error of the input or at Ctrl-C."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


def check_least(arguments: argparse.Namespace, **least: float) -> None:
    """Raises ValueError that names the first of these options that is less, or NaN.

    Options that were not given, and are None, may be so.
    """
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= smallest:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}; choose {smallest} or more")
