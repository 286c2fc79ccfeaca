"""Ends a text at the first stop string, wherever the pieces of the text are cut.

Knows no tokens.
"""

from collections.abc import Sequence


class StopScanner:
    """Passes text on until a stop string is complete; the stop string itself is not passed on.

    The first stop string to be complete wins, and of two that are complete at once the longer:
    the result is the same however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        """Watches for these strings, none of them empty; with none, all text passes."""
        assert "" not in stops, "an empty stop string"
        self._stops = tuple(stops)
        self._longest_start = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self._found = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns the text that is safe to show, and whether to stop.

        Text that could be the start of a stop string is held back. After a stop, nothing passes.
        """
        if self._found:
            return "", True
        text = self._held + text
        starts = [(text.find(stop), stop) for stop in self._stops]
        matches = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if matches:
            _, start = min(matches)
            self._found, self._held = True, ""
            return text[:start], True
        safe = len(text) - self._start_of_a_stop(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Ends the text and returns what was held back."""
        text, self._held = self._held, ""
        return text

    def _start_of_a_stop(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest_start, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
