"""Sequences end with whoever wanted them, before anything else happens."""

import asyncio
from contextlib import aclosing

import pytest

from moe_jax.server import Limits
from moe_jax.server.errors import ApiError
from moe_jax.server.options import Job
from moe_jax.server.service import Service
from tests.moe_jax.server.fake_engine import FakeEngine


def jobs(*prompts, **options):
    return [
        Job(prompt=prompt, options={"max_tokens": 9} | options, choice=i, answers=1, first=True)
        for i, prompt in enumerate(prompts)
    ]


def idle(service):
    load = service.engine.load_now
    return load.running == load.waiting == 0 and load.free_pages == load.pages


@pytest.mark.parametrize("prompts", [["abc"], ["abc", "de"]])
def test_reading_stops_in_the_middle(prompts):
    async def read_one():
        service = Service(FakeEngine(), "m", Limits())
        async with aclosing(service.pieces(jobs(*prompts))) as pieces:
            async for _ in pieces:
                break
        assert idle(service) and service.engine.cancelled == len(prompts)

    asyncio.run(read_one())


@pytest.mark.parametrize("method", ["pieces", "finished"])
def test_one_prompt_is_refused(method):
    """The others are not begun, or end; it is no fault of the engine."""

    async def ask():
        service = Service(FakeEngine(seconds=1), "m", Limits())
        refused = jobs("abc", "", "de")
        with pytest.raises(ApiError, match="the prompt is empty") as caught:
            if method == "finished":
                await service.finished(refused)
            else:
                async with aclosing(service.pieces(refused)) as pieces:
                    await anext(pieces)
        assert caught.value.status == 400
        assert idle(service) and service.failure is None

    asyncio.run(ask())


def test_a_value_error_while_it_runs_is_no_refusal():
    class Broken(FakeEngine):
        async def _pieces(self, prompt, params):
            raise ValueError("shapes differ")
            yield

    async def ask():
        service = Service(Broken(), "m", Limits())
        with pytest.raises(ValueError, match="shapes differ"):
            await anext(service.pieces(jobs("abc")))
        assert service.failure == "ValueError: shapes differ" and idle(service)

    asyncio.run(ask())
