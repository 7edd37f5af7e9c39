"""Reading a request's JSON body: bounded in size and time, and any mistake in it is a clear 400."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.events import ClientGone
from sparsejax.serve.openai.options import HttpOptions

log = logging.getLogger("sparsejax.serve")
_reported: set[str] = set()
MOST_REPORTED = 100


class Body(BaseModel):
    """Base of every request body. Types are not guessed; fields nobody knows are accepted and named once in the log."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


async def read_body[M: Body](request: Request, model: type[M]) -> M:
    """The body of a request as `model`.

    Raises:
        ApiError: 400 it is no JSON or does not fit; 408 it came too slowly; 413 it is too large.
    """
    data = await receive_body(request, request.app.state.options)
    try:
        # Refuses what json.loads lets through: NaN, lone surrogates, invalid UTF-8, nesting without end.
        values = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the request body is no valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"the request body is a {type(values).__name__}; send a JSON object.")
    try:
        body = model.model_validate(values)
    except ValidationError as error:
        raise validation_error(error) from error
    _report_unknown(body)
    return body


async def receive_body(request: Request, options: HttpOptions) -> bytes:
    """All bytes of a body.

    Raises:
        ApiError: 408 it came too slowly; 413 it is too large. ClientGone: the client left in the middle of it.
    """
    parts, size, most = [], 0, options.max_body_bytes
    try:
        async with asyncio.timeout(options.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise ApiError(413, f"the request body is larger than {most:,} bytes.", code="body_too_large")
                parts.append(part)
    except ClientDisconnect as error:
        raise ClientGone from error
    except TimeoutError as error:
        raise ApiError(408, f"the request body did not arrive within {options.body_timeout} s.") from error
    return b"".join(parts)


def validation_error(error: ValidationError) -> ApiError:
    """The first mistake in a body, by the path of its field."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    return ApiError(400, f"{param}: {first['msg']}." if param else first["msg"], param=param)


def _report_unknown(body: Body) -> None:
    for name in body.model_extra or ():
        if name not in _reported and len(_reported) < MOST_REPORTED:
            _reported.add(name)
            log.warning("unknown request field ignored", extra={"fields": {"field": name[:64]}})


def request_schema(model: type[Body]) -> dict[str, Any]:
    """What the interactive documentation shows of a body that `read_body` reads."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
