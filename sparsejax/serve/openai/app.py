"""The HTTP application: routes, one shape for every error, and what surrounds each request."""

from __future__ import annotations

import logging
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from sparsejax.errors import ConfigError, SparseJaxError
from sparsejax.serve.metrics import Metrics
from sparsejax.serve.openai import chat, completions, info, responses
from sparsejax.serve.openai.access import Access, Keys
from sparsejax.serve.openai.errors import ApiError, as_api_error
from sparsejax.serve.openai.events import ClientGone
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.openai.refusals import Refusals
from sparsejax.serve.service import Service

log = logging.getLogger("sparsejax.serve")
CLIENT_CLOSED = 499


def make_app(service: Service, options: HttpOptions | None = None) -> FastAPI:
    """An application over `service`, which the caller starts and stops.

    Raises:
        ConfigError: the chat template cannot be read.
    """
    options = options or HttpOptions()
    app = FastAPI(title="sparsejax", docs_url="/docs", redoc_url=None)
    names = service.names(options.served_model_name)
    app.state.service, app.state.options = service, options
    app.state.names = info.ModelNames(names)
    app.state.chat_template = _read_template(options.chat_template)
    app.state.metrics = Metrics(service, names[0])
    for module in (completions, chat, responses, info):
        app.include_router(module.router)
    app.add_exception_handler(SparseJaxError, _ours)
    app.add_exception_handler(ApiError, _api)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _bug)
    refusals = Refusals(service, app.state.metrics, options.body_timeout)
    app.add_middleware(Access, keys=Keys(options), metrics=app.state.metrics, refusals=refusals)
    return app


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={path!r} cannot be read as UTF-8 text: {error}.") from error


async def _ours(request: Request, error: SparseJaxError) -> Response:
    return as_api_error(error).response()


async def _api(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http(request: Request, error: HTTPException) -> Response:
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response()


async def _gone(request: Request, error: ClientGone) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _bug(request: Request, error: Exception) -> Response:
    log.error("bug", exc_info=error, extra={"fields": dict(request.state.record)})
    return ApiError(500, "an internal error; the server's log says more.", code="internal_error").response()
