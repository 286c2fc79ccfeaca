"""Several streams read at once, as one.

Knows nothing of what streams carry.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

_Item = TypeVar("_Item")


async def merge(
    streams: Sequence[AsyncGenerator[_Item, None]],
) -> AsyncGenerator[tuple[int, _Item], None]:
    """Yields (place of the stream, item) in order of arrival.

    The first error of a stream is raised. However this ends, all streams are closed before it does.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, _Item] | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[_Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    arrived.put_nowait((index, item))
        finally:
            arrived.put_nowait(None)  # look whether it failed

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            arrival = await arrived.get()
            if arrival is not None:
                yield arrival
                continue
            open_streams -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
