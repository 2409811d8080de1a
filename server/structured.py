"""Fields of a request that say what its answer has to fit: OpenAI's response_format and tool_choice, and vLLM's."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine.grammar import calls_rule, choice_rule, grammar_of, json_rule, lark_grammar, regex_rule

MAX_ALTERNATIVES = 10_000


def parsed(value: Any) -> Any:
    """A JSON schema that was sent as a text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None


Schema = Annotated[dict[str, Any] | bool, BeforeValidator(parsed)]
Choice = Annotated[list[str], Field(min_length=1, max_length=MAX_ALTERNATIVES, fail_fast=True)]


def is_strict(tool: dict) -> bool:
    return bool(tool["function"].get("strict"))


class NullsLeftOut(BaseModel):
    """A field that is null has its default."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class NamedSchema(NullsLeftOut):
    """What `json_schema` of a response_format contains; every schema is enforced, with or without `strict`."""

    name: str = ""
    description: str = ""
    strict: bool = False
    json_schema: Schema = Field(True, alias="schema")


class ResponseFormat(NullsLeftOut):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    object_schema: Schema | None = Field(None, alias="schema")  # llama.cpp's, of a json_object

    @model_validator(mode="after")
    def has_a_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('json_schema is missing: {"type": "json_schema", "json_schema": {"schema": …}}')
        return self

    def rule(self) -> str | None:
        if self.type == "json_schema":
            return json_rule(self.json_schema.json_schema)
        return json_rule(self.object_schema or {"type": "object"}) if self.type == "json_object" else None


class StructuredOutputs(NullsLeftOut):
    """vLLM's field of this name; the older fields guided_… mean the same."""

    model_config = ConfigDict(extra="forbid")

    json_schema: Schema | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def is_one(self):
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self


class StructuredRequest(BaseModel):
    """The fields of both endpoints."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def one_structure(self):
        guided = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        given = [StructuredOutputs(**{name: value}) for name, value in guided.items() if value is not None]
        given += [self.structured_outputs] if self.structured_outputs else []
        if len(given) + bool(self.response_format and self.response_format.type != "text") > 1:
            raise ValueError("give one of response_format, structured_outputs and the guided_ fields")
        self.structured_outputs = given[0] if given else None
        return self

    @property
    def is_structured(self) -> bool:
        """Whether its answer may have to fit a grammar."""
        has_format = self.response_format and self.response_format.type != "text"
        tools = getattr(self, "offered_tools", [])
        is_forced = getattr(self, "tool_choice", "auto") not in ("auto", "none")
        return bool(has_format or self.structured_outputs or is_forced or any(map(is_strict, tools)))

    def document_structure(self, calls: str | None = None) -> tuple[str, bool] | None:
        """The grammar of the answer, or of these calls in its place, with False; None if any text will do.

        UserError for a grammar that cannot be read, ValueError for one that is to be combined with calls.
        """
        wanted = self.structured_outputs
        if wanted and wanted.grammar is not None:
            if calls:
                raise ValueError("a grammar cannot be combined with tools: give tool_choice none")
            return lark_grammar(wanted.grammar), False
        if wanted is None:
            rule = self.response_format and self.response_format.rule()
        elif wanted.regex is not None:
            rule = regex_rule(wanted.regex)
        elif wanted.choice is not None:
            rule = choice_rule(wanted.choice)
        else:
            rule = json_rule({"type": "object"} if wanted.json_object else wanted.json_schema)
        return (grammar_of(rule, *([calls] if calls else [])), False) if rule else None


class NamedFunction(NullsLeftOut):
    name: str


class NamedTool(NullsLeftOut):
    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["auto", "none", "required"] | NamedTool


def structure_of(
    request: StructuredRequest, tools: list[dict], choice: ToolChoice, several: bool, tags: tuple[int, int] | None
) -> tuple[str, bool] | None:
    """The grammar of a chat's answer, and whether it holds for the calls only, from each one's beginning.

    tools: those that the client offers. several: whether an answer may call more than one. tags: the tokens of a call.
    None if any text will do.
    """
    if tools and tags is None:
        raise ValueError("this model's chat format has no tokens for calls of tools")
    if choice in ("auto", "none"):
        structure = request.document_structure(calls_rule(tools, tags, several) if tools else None)
        if structure is None and any(map(is_strict, tools)):
            return grammar_of(calls_rule(tools, tags, several=False)), True
        return structure
    name = None if choice == "required" else choice.function.name
    called = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not called:
        raise ValueError("tool_choice needs tools" if name is None else f"tools has no function {name[:100]!r}")
    return grammar_of(calls_rule(called, tags, several and name is None)), False
