"""What an output must look like: a JSON schema, a regular expression, a choice or a grammar. Imports no JAX."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsejax.engine.validate import check_texts, reject

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """One rule that every output follows; exactly one field is given.

    Attributes:
        json: a JSON schema, as a mapping or as text.
        regex: a regular expression that the whole output matches (no look-around, no back-references).
        choice: texts of which the output is one.
        grammar: a grammar in Lark or GBNF notation.
        json_object: True for any JSON object.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            reject("structured_outputs", given, f"exactly one of {', '.join(KINDS)}")
        (kind,) = given
        value = getattr(self, kind)
        if kind == "choice":
            object.__setattr__(self, "choice", check_texts("structured_outputs.choice", value))
            if not self.choice:
                reject("structured_outputs.choice", value, "a list with at least one text")
        elif kind == "json":
            if not isinstance(value, (str, Mapping, bool)):
                reject("structured_outputs.json", value, "a JSON schema, as a mapping or as text")
        elif kind == "json_object":
            if value is not True:
                reject("structured_outputs.json_object", value, "True")
        elif not isinstance(value, str) or not value:
            reject(f"structured_outputs.{kind}", value, "a text that is not empty")

    @property
    def key(self) -> tuple[str, str]:
        """The kind of the rule and its text; equal rules have equal keys.

        Raises:
            RequestError: the schema is no JSON.
        """
        if self.json is not None:
            return "json", self._schema_text()
        if self.choice is not None:
            return "choice", json.dumps(list(self.choice))
        if self.json_object:
            return "json", '{"type": "object"}'
        return ("regex", self.regex) if self.regex is not None else ("grammar", self.grammar)

    def _schema_text(self) -> str:
        try:
            schema = json.loads(self.json) if isinstance(self.json, str) else self.json
            if not isinstance(schema, (Mapping, bool)):
                reject("structured_outputs.json", self.json, "a JSON schema: an object")
            return json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            reject("structured_outputs.json", self.json, "a JSON schema", f"It cannot be read: {error}.")

    @classmethod
    def coerce(cls, value: Any) -> StructuredOutputs:
        """A mapping of the fields, or an object that is one already.

        Raises:
            RequestError: an unknown field, or not exactly one rule.
        """
        if isinstance(value, cls):
            return value
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, Mapping) or set(value) - names:
            reject("structured_outputs", value, f"a mapping with one of {', '.join(KINDS)}")
        return cls(**value)
