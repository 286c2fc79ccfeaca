"""How a script ends: with the exit code of its main, or with one line of what was wrong.

Knows nothing of what the scripts do.
"""

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
