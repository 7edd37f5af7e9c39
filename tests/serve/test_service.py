"""The service without any protocol: bounds, states, streams that cannot hold the engine, an orderly end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from sparsejax import SamplingParams
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.errors import CapacityError, ModelError, RequestError, SparseJaxError
from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.errors import Overloaded, Unavailable
from sparsejax.serve.service import Service, Status
from tests.engine.models import random_prompts, tiny_engine

PROMPTS = random_prompts(3, (5, 40, 12, 9, 70, 3, 18, 27))


def params(tokens: int = 12, kind: str = "DELTA", **options) -> SamplingParams:
    defaults = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "output_kind": kind}
    return SamplingParams(**{**defaults, **options})


@pytest.fixture(scope="module")
def engine():
    """One engine for many services; its pool holds 480 tokens."""
    engine = AsyncEngine(engine=tiny_engine(kv_memory_bytes=250_000))
    yield engine
    asyncio.run(engine.shutdown())


@pytest.fixture
def serve(engine):
    """Runs ``scenario(service)`` against a new service over the engine; no request and no page may be left behind."""

    def serve(scenario, limits: ServiceLimits | None = None):
        async def run():
            service = Service(None, limits, load=lambda: engine)
            service.start()
            await service.loaded()
            result = await asyncio.wait_for(scenario(service), 120)
            assert await service.drain(120)  # a first use may compile
            assert service.stats()["kv_live_pages"] == 0
            assert (service.admission.requests, service.admission.prompt_tokens) == (0, 0)
            return result

        return asyncio.run(run())

    return serve


@pytest.fixture(scope="module")
def wanted(engine):
    async def generate():
        return await asyncio.gather(*(final(engine, prompt) for prompt in PROMPTS))

    async def final(engine, prompt):
        return [output async for output in engine.generate(prompt, params(kind="FINAL_ONLY"))][-1]

    return [output.outputs[0].token_ids for output in asyncio.run(generate())]


async def read(service, prompt, sampling) -> list[int]:
    tokens = []
    async with await service.submit(prompt, sampling) as stream:
        async for output in stream:
            tokens += output.outputs[0].token_ids
    return tokens


def test_many_streams_give_what_the_engine_gives(serve, wanted):
    async def scenario(service):
        return await asyncio.gather(*(read(service, prompt, params()) for prompt in PROMPTS))

    assert serve(scenario) == wanted


def test_a_slow_reader_gets_everything_and_holds_nothing(serve, wanted):
    async def scenario(service):
        stream = await service.submit(PROMPTS[0], params(40))
        while service.admission.requests:  # the engine finishes without a single read
            await asyncio.sleep(0.01)
        assert service.stats()["kv_live_pages"] == 0
        outputs = [output async for output in stream]
        assert len(outputs) == 1 and outputs[0].finished
        return outputs[0].outputs[0].token_ids

    assert serve(scenario)[:12] == wanted[0]


def test_a_reader_that_never_reads_is_given_up(serve):
    async def scenario(service):
        stream = await service.submit(PROMPTS[0], params(400))
        while not stream.ended:
            await asyncio.sleep(0.01)
        with pytest.raises(SparseJaxError, match="was not read"):
            async for output in stream:
                assert not output.finished

    serve(scenario, ServiceLimits(patience=0.02))


def test_closing_and_cancelling_give_the_pages_back(serve):
    async def scenario(service):
        streams = [await service.submit(prompt, params(300)) for prompt in PROMPTS]
        for stream in streams[:4]:
            await anext(stream)
            stream.close()
        tasks = [asyncio.create_task(stream.final()) for stream in streams[4:]]
        await asyncio.sleep(0.02)
        await service.abort([stream.request_id for stream in streams])
        ends = await asyncio.gather(*tasks)
        assert {end.outputs[0].finish_reason for end in ends} == {"abort"}
        submitting = asyncio.create_task(service.submit(PROMPTS[0], params(300)))
        await asyncio.sleep(0)
        submitting.cancel()

    serve(scenario)


def test_bad_requests_are_raised_before_anything_streams(serve):
    async def scenario(service):
        for prompt, sampling, error in (
            ([], params(), RequestError),
            ([10**6], params(), RequestError),
            (PROMPTS[0], {"temperature": -1}, RequestError),
            (PROMPTS[0], params(sparsity="quest"), RequestError),
            (list(range(100)) * 4, params(100), CapacityError),
        ):
            with pytest.raises(error):
                await service.submit(prompt, sampling)
        first = await service.submit(PROMPTS[0], params(200), request_id="same")
        with pytest.raises(RequestError, match="in use"):
            await service.submit(PROMPTS[0], params(), request_id="same")
        first.close()
        assert service.rejected == {"invalid": 6}

    serve(scenario)


def test_the_queue_is_bounded(serve):
    async def scenario(service):
        streams = [await service.submit(PROMPTS[0], params(300)) for _ in range(6)]
        with pytest.raises(Overloaded) as refused:
            await service.submit(PROMPTS[0], params(n=3, temperature=1.0))
        assert refused.value.retry_after >= 1
        streams.append(await service.submit(PROMPTS[0], params(n=2, temperature=1.0)))
        assert service.admission.requests == 8
        for stream in streams:
            stream.close()

    serve(scenario, ServiceLimits(max_requests=8))


def test_waiting_prompts_are_bounded_in_tokens(serve):
    async def scenario(service):
        first = await service.submit(PROMPTS[1], params(300))
        with pytest.raises(Overloaded, match="prompt tokens"):
            await service.submit(PROMPTS[4], params())
        first.close()

    serve(scenario, ServiceLimits(max_prompt_tokens=100))


def test_states_from_loading_to_stopped():
    release = threading.Event()

    def load() -> AsyncEngine:
        release.wait(10)
        return AsyncEngine(engine=tiny_engine())

    async def run():
        service = Service(None, load=load)
        service.start()
        assert (service.status, service.alive) == (Status.LOADING, True)
        with pytest.raises(Unavailable, match="loading"):
            await service.submit(PROMPTS[0])
        release.set()
        await service.loaded()
        assert (service.status, service.alive) == (Status.READY, True)
        running = await service.submit(PROMPTS[0], params(60, kind="FINAL_ONLY"))
        draining = asyncio.create_task(service.drain(30))
        await asyncio.sleep(0)
        assert service.status is Status.DRAINING
        with pytest.raises(Unavailable, match="draining"):
            await service.submit(PROMPTS[0])
        assert (await running.final()).outputs[0].finish_reason == "length"
        assert await draining
        await service.stop()
        await service.stop()
        assert (service.status, service.alive, service.stats()) == (Status.STOPPED, False, {})

    asyncio.run(run())


def test_a_drain_that_takes_too_long_aborts(engine):
    async def run():
        service = Service(None, load=lambda: engine)
        service.start()
        await service.loaded()
        stream = await service.submit(PROMPTS[0], params(400, kind="FINAL_ONLY"))
        assert not await service.drain(0.01)
        assert (await stream.final()).outputs[0].finish_reason == "abort"

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_fails_the_service():
    def load() -> AsyncEngine:
        raise ModelError("no such model")

    async def run():
        service = Service(None, load=load)
        service.start()
        with pytest.raises(ModelError, match="no such model"):
            await service.loaded()
        assert (service.status, service.alive) == (Status.FAILED, False)

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_tells_every_caller(monkeypatch):
    async def run():
        service = Service(None, load=lambda: AsyncEngine(engine=tiny_engine()))
        service.start()
        await service.loaded()
        stream = await service.submit(PROMPTS[0], params(400))
        monkeypatch.setattr(service.engine.engine.core, "step", lambda: 1 / 0)
        with pytest.raises(SparseJaxError, match="no longer runs"):
            async for _ in stream:
                pass
        assert (service.status, service.alive) == (Status.FAILED, False)
        with pytest.raises(Unavailable, match="failed"):
            await service.submit(PROMPTS[0])
        await service.stop()

    asyncio.run(run())


def test_a_step_that_hangs_is_seen(serve):
    """A liveness probe restarts a process whose engine makes no step although it has work."""
    release = threading.Event()

    async def scenario(service):
        core = service.engine.engine.core
        step = core.step
        core.step = lambda: release.wait(20) and step()
        stream = await service.submit(PROMPTS[0], params())
        while service.alive:
            await asyncio.sleep(0.02)
        assert service.status is Status.READY
        release.set()
        await anext(stream)
        assert service.alive
        core.step = step
        stream.close()

    serve(scenario, ServiceLimits(stuck_after=0.3))
