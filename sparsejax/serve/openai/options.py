"""`HttpOptions`: every setting of the HTTP server. Imports nothing of the web."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsejax.serve.checks import above_zero, at_least_zero, check_server, one_of

TOOL_PARSERS = ("auto", "hermes", "llama3_json", "none")


@dataclass(frozen=True)
class HttpOptions:
    """Settings of the HTTP server.

    Attributes:
        host: address to listen on; 0.0.0.0 is every one.
        port: port to listen on; 0 takes a free one.
        api_key: key that clients must send as a bearer token (give it again for more keys); the environment
            variable SPARSEJAX_API_KEY holds one too. Without any, everybody may ask.
        served_model_name: name of the model in requests and answers (give it again for aliases).
        key_requests_per_minute: requests that one key may start in a minute; 0 is no limit.
        key_concurrency: requests of one key that may run at once; 0 is no limit.
        max_body_bytes: largest request body.
        head_timeout: seconds in which the head of a request must have arrived.
        body_timeout: seconds in which a request body must have arrived.
        send_timeout: seconds that a client may take to accept a piece of the answer.
        shutdown_timeout: seconds that running requests get to finish after SIGTERM.
        tool_call_parser: format of tool calls in the model's text: auto (read off the chat template), hermes
            (also Qwen), llama3_json, or none.
        chat_template: file with the chat template to use instead of the model's.
        trust_request_chat_template: let requests bring their own chat template.
        log_level: debug, info, warning or error; prompts and answers are never logged.
        ssl_certfile: certificate file; turns on TLS.
        ssl_keyfile: private key of the certificate.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: Sequence[str] = ()
    served_model_name: Sequence[str] = ()
    key_requests_per_minute: int = 0
    key_concurrency: int = 0
    max_body_bytes: int = 8 << 20
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    shutdown_timeout: float = 30.0
    tool_call_parser: str = "auto"
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    log_level: str = "info"
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        check_server(self)
        one_of("tool_call_parser", self.tool_call_parser, TOOL_PARSERS)
        above_zero(self, "max_body_bytes", "head_timeout", "body_timeout", "send_timeout")
        at_least_zero(self, "key_requests_per_minute", "key_concurrency")
