"""Routes beside generation: models, tokens, health, readiness, version and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from sparsejax.serve.openai.body import Body, read_body, request_schema
from sparsejax.serve.openai.chat import TemplateFields, render
from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.messages import Message
from sparsejax.serve.service import Service, Status

router = APIRouter()


class ModelNames:
    """The names under which the one model is served."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def check(self, name: str | None) -> str:
        """The name to answer with; without one it is the first.

        Raises:
            ApiError: 404 no such model.
        """
        if name is None or name == "":
            return self.names[0]
        if name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise ApiError(
                404, f"there is no model {name[:200]!r} here; this server has {known}.", code="model_not_found"
            )
        return name


class TokenizeRequest(TemplateFields):
    prompt: str | None = None
    messages: list[Message] | None = None  # type: ignore[assignment]
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    names: ModelNames = request.app.state.names
    return {"object": "list", "data": [_card(request, name) for name in names.names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    return _card(request, request.app.state.names.check(name))


def _card(request: Request, name: str) -> dict[str, Any]:
    state = request.app.state
    engine = state.service.engine.engine  # 503 while there is none
    return {
        "id": name,
        "object": "model",
        "created": state.service.created,
        "owned_by": "sparsejax",
        "root": state.service.config.model or state.names.names[0],
        "parent": None,
        "max_model_len": engine.max_model_len,
    }


@router.post("/tokenize", openapi_extra=request_schema(TokenizeRequest))
async def tokenize(request: Request) -> dict[str, Any]:
    """Token ids of a text or of a conversation."""
    body = await read_body(request, TokenizeRequest)
    state = request.app.state
    state.names.check(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages.", param="prompt")
    if body.messages is not None:
        tokens = (await render(state, body, use_tools=True))["prompt_token_ids"]
    else:
        tokens = await state.service.tokenize(body.prompt, body.add_special_tokens)
    engine = state.service.engine.engine
    answer = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = engine.tokenizer.convert_ids_to_tokens(tokens)
    return answer


@router.post("/detokenize", openapi_extra=request_schema(DetokenizeRequest))
async def detokenize(request: Request) -> dict[str, Any]:
    """Text of token ids."""
    body = await read_body(request, DetokenizeRequest)
    request.app.state.names.check(body.model)
    return {"prompt": await request.app.state.service.detokenize(body.tokens)}


@router.get("/health")
@router.get("/ping")
async def health(request: Request) -> Response:
    """Liveness: 200 while waiting for this process makes sense, also while it loads or drains."""
    service: Service = request.app.state.service
    return JSONResponse({"status": service.status.value}, 200 if service.alive else 503)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Readiness: 200 if requests are taken, after loading and warm-up and before draining."""
    service: Service = request.app.state.service
    is_ready = service.status is Status.READY and service.alive
    return JSONResponse({"status": service.status.value}, 200 if is_ready else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    import sparsejax

    return {"version": sparsejax.__version__}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Samples that are queued or running."""
    return {"server_load": request.app.state.service.admission.requests}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    body, content_type = request.app.state.metrics.render(request.headers.get("accept", ""))
    return Response(body, media_type=None, headers={"Content-Type": content_type})
