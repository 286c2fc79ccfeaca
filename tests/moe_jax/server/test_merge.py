"""Several streams as one."""

import asyncio
from contextlib import aclosing

import pytest

from moe_jax.server.merge import merge


class Source:
    """Yields numbers; says whether it was closed."""

    def __init__(self, count, seconds=0.0, error=None):
        self.count, self.seconds, self.error = count, seconds, error
        self.began = self.ended = False

    async def __call__(self):
        self.began = True
        try:
            for number in range(self.count):
                await asyncio.sleep(self.seconds)
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.ended = True


async def read(sources, limit=None):
    items = []
    async with aclosing(merge([source() for source in sources])) as merged:
        async for item in merged:
            items.append(item)
            if len(items) == limit:
                break
    return items


@pytest.mark.parametrize("count", [1, 2, 5])
def test_everything_arrives_in_each_streams_order(count):
    sources = [Source(number) for number in range(count)]
    items = asyncio.run(read(sources))
    for index in range(count):
        assert [item for place, item in items if place == index] == list(range(index))


@pytest.mark.parametrize("count", [1, 3])
def test_whoever_stops_reading_closes_all(count):
    sources = [Source(1000, seconds=0.001) for _ in range(count)]
    assert len(asyncio.run(read(sources, limit=4))) == 4
    assert all(source.ended for source in sources)


@pytest.mark.parametrize("others", [0, 2])
def test_an_error_of_one_closes_the_others(others):
    sources = [Source(1000, seconds=0.001) for _ in range(others)]
    sources.append(Source(2, error=ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(read(sources))
    assert all(source.ended for source in sources)


@pytest.mark.parametrize("count", [1, 3])
def test_a_reader_that_is_cancelled_closes_all(count):
    sources = [Source(1000, seconds=0.001) for _ in range(count)]

    async def cancelled():
        task = asyncio.create_task(read(sources))
        while not all(source.began for source in sources):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(source.ended for source in sources)

    asyncio.run(cancelled())
