"""A stream between two threads: no wake-up that comes late or twice ends it, and nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from sparsejax.engine.params import RequestOutputKind
from sparsejax.engine.request import CompletionOutput, RequestOutput
from sparsejax.engine.stream import Stream


def output(*token_ids: int, finished: bool = False) -> RequestOutput:
    part = CompletionOutput(0, "".join(chr(96 + i) for i in token_ids), list(token_ids))
    made = RequestOutput("r", None, [1], outputs=[part], finished=finished)
    return dataclasses.replace(made, outputs=[dataclasses.replace(part, finish_reason="stop")]) if finished else made


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_a_wake_for_what_was_read_already_ends_nothing(kind):
    async def read() -> list[list[int]]:
        stream = Stream("r", [1], kind, lambda stream: None)
        got = []

        async def reader() -> None:
            async for one in stream:
                got.append(one.outputs[0].token_ids)

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        stream.put(output(1))
        stream.wake()
        await asyncio.sleep(0.01)
        stream.wake()  # the engine's thread scheduled it before the reader took the output
        await asyncio.sleep(0.01)
        assert not task.done()
        stream.put(output(2, finished=True))
        stream.wake()
        await asyncio.wait_for(task, 5)
        return got

    assert asyncio.run(read()) == [[1], [2]]


def test_a_request_that_leaves_without_output_ends_its_stream():
    async def read() -> list[RequestOutput]:
        stream = Stream("r", [1], RequestOutputKind.DELTA, lambda stream: None)
        stream.end()
        stream.wake()
        return [one async for one in stream]

    assert asyncio.run(read()) == []
