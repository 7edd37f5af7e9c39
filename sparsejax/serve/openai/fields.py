"""Request fields that every generating route shares, and how they become `SamplingParams`."""

from __future__ import annotations

from typing import Any, Literal

from sparsejax.engine.params import RequestOutputKind, SamplingParams
from sparsejax.serve.openai.body import Body
from sparsejax.serve.openai.errors import ApiError

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    name: str = "schema"
    schema_: dict[str, Any] | bool | None = None
    strict: bool | None = None

    model_config = {**Body.model_config, "alias_generator": lambda name: name.rstrip("_")}


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Body):
    """OpenAI's sampling fields and vLLM's extensions. None is the default of `SamplingParams`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    sparsity: str | dict[str, Any] | None = None
    cache_salt: str | None = None
    keep_alive: float | None = None
    conversation: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    priority: int = 0
    request_id: str | None = None
    return_token_ids: bool | None = None

    def sampling(self, **values: Any) -> SamplingParams:
        """What `SamplingParams` says of these fields; `values` win over them.

        Raises:
            RequestError: a value is out of range. ApiError: two rules for the output.
        """
        own = {name: getattr(self, name) for name in _SAMPLED if getattr(self, name) is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        merged = {**own, "structured_outputs": self.rule(), "output_kind": kind, **values}
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream=true.", param="stream_options")
        return SamplingParams.from_dict(merged)

    def rule(self) -> dict[str, Any] | None:
        """The rule for the output in whichever of its spellings it came, or None."""
        rules = [({kind: value}, name) for name, kind in _GUIDED.items() if (value := getattr(self, name)) is not None]
        if self.structured_outputs is not None:
            rules.append((self.structured_outputs, "structured_outputs"))
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            rules.append(({"json_object": True}, "response_format"))
        elif wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema_ is None:
                raise ApiError(400, "response_format needs json_schema.schema.", param="response_format")
            rules.append(({"json": wanted.json_schema.schema_}, "response_format"))
        if len(rules) > 1:
            names = ", ".join(name for _, name in rules)
            raise ApiError(400, f"{names} all set a rule for the output; give one of them.", param=rules[1][1])
        return rules[0][0] if rules else None


_SAMPLED = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop", "stop_token_ids", "bad_words", "include_stop_str_in_output"),
    *("ignore_eos", "max_tokens", "min_tokens", "prompt_logprobs", "logit_bias", "allowed_token_ids"),
    *("skip_special_tokens", "spaces_between_special_tokens", "sparsity", "cache_salt"),
    *("keep_alive", "conversation"),
)
