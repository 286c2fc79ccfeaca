"""What a caller holds of a request that runs: its pieces as they come, its result, a way to end it.

Knows neither scheduling nor sampling; who makes the next piece is asked of `advance`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from moe_jax.engine.outputs import Completion, Piece, Timing


class Handle:
    """A submitted request.

    Pieces are read once, by one reader; the result may be asked for as often as wanted. Both raise
    what went wrong with the request, if something did.
    """

    def __init__(
        self,
        advance: Callable[[Callable[[], bool]], None],
        cancel: Callable[["Handle"], None],
        prompt: int,
    ):
        """`prompt` is the number of its tokens.

        `advance` waits for its turn to run a step, and runs one unless it is told that what was
        waited for has come.
        """
        self._advance = advance
        self._cancel = cancel
        self._unread: deque[Piece] = deque()
        self._completions: tuple[Completion, ...] | None = None
        self._error: BaseException | None = None
        self._listener: Callable[[], None] | None = None
        self._submitted = time.perf_counter()
        self._started: float | None = None
        self._first: float | None = None
        self.prompt_tokens = prompt
        self.cached_tokens = 0
        self.generated_tokens = 0

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._completions is not None or self._error is not None

    @property
    def news(self) -> bool:
        """Whether a reader need not wait: there is a piece, or the end."""
        return bool(self._unread) or self.done

    def pieces(self) -> Iterator[Piece]:
        """Yields what each step adds; closing the iterator cancels the request.

        A beam search has one piece: its best text, at the end.
        """
        try:
            while (piece := self.next_piece()) is not None:
                yield piece
        finally:
            self.cancel()

    def next_piece(self) -> Piece | None:
        """The next piece, for which it runs steps if it must; None after the last."""
        while not self.news:
            self._advance(lambda: self.news)
        return self.take_piece()

    def take_piece(self) -> Piece | None:
        """A piece that is there already, or None; raises what ended the request."""
        if self._unread:
            return self._unread.popleft()
        if self._error is not None:
            raise self._error
        return None

    def results(self) -> tuple[Completion, ...]:
        """All its completions, the best first; more than one only with num_return."""
        while not self.done:
            self._advance(lambda: self.done)
        if self._error is not None:
            raise self._error
        assert self._completions is not None
        return self._completions

    def result(self) -> Completion | list[Completion]:
        """Its completion; with num_return above 1 a list of them, the best first."""
        found = self.results()
        return found[0] if len(found) == 1 else list(found)

    def cancel(self) -> None:
        """Ends the request within one step; nothing happens if it has ended."""
        if not self.done:
            self._cancel(self)

    def notify(self, listener: Callable[[], None]) -> None:
        """Has `listener` called, from any thread, whenever there is something new."""
        self._listener = listener

    def began(self, cached: int) -> None:
        """Notes that its first step is about to run."""
        if self._started is None:
            self._started = time.perf_counter()
            self.cached_tokens = cached

    def put(self, piece: Piece) -> None:
        """Adds what a step gave it, before it has ended."""
        self.count_token()
        self._unread.append(piece)
        self._tell()

    def count_token(self) -> None:
        """Notes that it has a token more."""
        if self._first is None:
            self._first = time.perf_counter()
        self.generated_tokens += 1

    def finish(self, last: Piece, completions: Callable[[Timing], tuple[Completion, ...]]) -> None:
        """Ends it with its last piece and what it gave."""
        found = completions(self._timing())
        self._unread.append(replace(last, completion=found[0]))
        self._completions = found
        self._let_go()
        self._tell()

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, which its reader gets."""
        self._error = error
        self._let_go()
        self._tell()

    def _timing(self) -> Timing:
        now = time.perf_counter()
        since = lambda moment: None if moment is None else moment - self._submitted
        later = self.generated_tokens - 1
        spent = None if self._first is None or later < 1 else (now - self._first) / later
        queued = since(self._started)
        return Timing(
            queued=now - self._submitted if queued is None else queued,
            first_token=since(self._first),
            total=now - self._submitted,
            per_token=spent,
        )

    def _let_go(self) -> None:
        """Forgets the engine, whose memory a request that has ended must not keep."""
        self._advance = self._cancel = _do_nothing

    def _tell(self) -> None:
        if self._listener is not None:
            self._listener()


def _do_nothing(_: object) -> None:
    """For who was about to wait in another thread when the request ended."""
