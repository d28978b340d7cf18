"""An instance for a JSON schema: what the stub says where JSON is asked for.

The same schema and prompt give the same instance. Values come from the prompt
where they can: its numbers and its quoted texts in their order, and those
members of an enum that it names.
"""

import json
import math
import re
from fractions import Fraction
from typing import Any

from pydantic import Field

from ..answers import answer
from ..stable import digest, normal, unit
from .errors import ApiError, Json
from .requests import ApiObject

DEEPEST = 2  # times that one definition may stand within itself
MOST = 10_000  # values in one instance, and characters that its texts must have
ENUM_MOST = 1000  # values in one enum, as the API has it
QUOTED = re.compile(r"(?<!\w)(['\"`])(.{1,500}?)\1(?!\w)")
# Read elsewhere, or without a bearing on what is valid.
IGNORED = frozenset(
    """
    $comment $defs $id $schema default definitions deprecated description examples
    readOnly title writeOnly
    """.split()
)
TYPED = frozenset({"type", "properties", "required", "additionalProperties"})
KEYWORDS = {
    "object": frozenset({"minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"format", "minLength", "maxLength"}),
    "number": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
KINDS = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "P1D",
    "email": "stub@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


class UnsupportedError(Exception):
    """A construct of a schema that the stub does not know, by name."""


class _TooDeepError(Exception):
    """A definition stands within itself too often."""


class Schema(ApiObject):
    """The schema that an answer must have."""

    name: str
    description: str | None = None
    schema_: Json = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


def json_text(schema: Json, question: str, param: str) -> str:
    """An instance of the schema; ApiError 400 for what the stub does not know."""
    try:
        return json.dumps(
            instance(schema, question), ensure_ascii=False, allow_nan=False
        )
    except UnsupportedError as error:
        message = f"Invalid schema in '{param}': this stub does not know {error}."
        raise ApiError(400, message, param, "invalid_schema") from None
    except ValueError:
        message = f"Invalid schema in '{param}': NaN and Infinity are not JSON."
        raise ApiError(400, message, param, "invalid_schema") from None


def json_object(prompt: str, question: str) -> str:
    """An answer for JSON mode, which wants the word in the messages."""
    if "json" not in prompt.casefold():
        message = "'messages' must contain the word 'json' in some form."
        raise ApiError(400, message, "messages")
    return json.dumps(loose(prompt, answer(question)), ensure_ascii=False)


def instance(schema: Json, prompt: str) -> Any:
    """A value that is valid against the schema; raises UnsupportedError."""
    try:
        return _Maker(schema, prompt).make(schema, "value")
    except _TooDeepError:
        raise UnsupportedError("a definition that never ends") from None
    except RecursionError:
        raise UnsupportedError("a schema as deep as this") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise UnsupportedError("a keyword with a value of a wrong type") from None


def loose(prompt: str, text: str) -> Json:
    """Some object, for JSON mode: its keys are the quoted words of the prompt."""
    return dict.fromkeys(re.findall(r"[`'\"](\w+)[`'\"]", prompt) or ["answer"], text)


class _Maker:
    def __init__(self, root: Json, prompt: str) -> None:
        self.root, self.prompt = root, normal(prompt)
        self.key = digest(self.prompt)
        self.numbers = [
            float(text) if "." in text or len(text) > 300 else int(text)
            for text in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", prompt)
        ]
        self.texts = [text for _, text in QUOTED.findall(prompt)]
        self.made = 0
        self.open: list[str] = []  # the references that are being followed

    def make(self, schema: Any, name: str) -> Any:
        self.spend(1)
        if schema is True or schema == {}:
            return self.text({}, name)
        if not isinstance(schema, dict):
            raise UnsupportedError(f"the schema {schema!r}")
        if "$ref" in schema:
            only(schema, {"$ref"})
            return self.follow(str(schema["$ref"]), name)
        for keyword in ("anyOf", "allOf"):
            if keyword in schema:
                only(schema, {keyword})
                return self.choose(schema[keyword], keyword, name)
        if "const" in schema:
            only(schema, {"const", "type"})
            return self.member([schema["const"]], schema, name)
        if "enum" in schema:
            only(schema, {"enum", "type"})
            return self.member(schema["enum"], schema, name)
        kind = self.kind(schema)
        known = "number" if kind == "integer" else kind
        if known not in KEYWORDS:
            raise UnsupportedError(f"the type {kind!r}")
        only(schema, KEYWORDS[known] | TYPED)
        match kind:
            case "object":
                return self.object(schema)
            case "array":
                return self.array(schema, name)
            case "string":
                return self.text(schema, name)
            case "integer" | "number":
                return self.number(schema, whole=kind == "integer")
            case "boolean":
                return unit(self.key, name) < 0.5
            case _:
                return None

    def spend(self, parts: int) -> None:
        self.made += parts
        if self.made > MOST:
            raise UnsupportedError(f"a schema with more than {MOST} values")

    def kind(self, schema: Json) -> Any:
        kinds = schema.get("type")
        known = {*KEYWORDS, "integer"}
        if isinstance(kinds, list) and not (kinds and known.issuperset(kinds)):
            raise UnsupportedError(f"the type {kinds!r}")
        if isinstance(kinds, list) and kinds:  # a value rather than none
            return next((kind for kind in kinds if kind != "null"), "null")
        if kinds is None:
            return (
                "object"
                if "properties" in schema
                else "array"
                if "items" in schema
                else "string"
            )
        return kinds

    def follow(self, reference: str, name: str) -> Any:
        if self.open.count(reference) >= DEEPEST:
            raise _TooDeepError
        target: Any = self.root
        if reference != "#" and not reference.startswith("#/"):
            raise UnsupportedError(f"the reference {reference!r}")
        for step in reference.removeprefix("#").split("/")[1:]:
            if not isinstance(target, dict) or step not in target:
                raise UnsupportedError(f"the reference {reference!r}")
            target = target[step]
        self.open.append(reference)
        try:
            return self.make(target, name)
        finally:
            self.open.pop()

    def choose(self, options: list[Any], keyword: str, name: str) -> Any:
        if keyword == "allOf" and len(options) != 1:
            raise UnsupportedError("'allOf' of more than one schema")
        ordered = sorted(options, key=lambda option: option == {"type": "null"})
        for option in ordered[:-1]:
            try:
                return self.make(option, name)
            except _TooDeepError:
                continue
        return self.make(ordered[-1], name)

    def member(self, members: Any, schema: Json, name: str) -> Any:
        if not isinstance(members, list):
            raise UnsupportedError(f"the enum {members!r}")
        if len(members) > ENUM_MOST:
            raise UnsupportedError(f"an enum of more than {ENUM_MOST} values")
        fitting = [one for one in members if is_of(one, schema.get("type"))]
        if not fitting:
            raise UnsupportedError("an 'enum' or 'const' with no value of its type")
        for one in fitting:
            if isinstance(one, str) and self.names(normal(one)):
                return one
        return fitting[int(unit(self.key, name) * len(fitting))]

    def names(self, text: str) -> bool:
        if not text or text not in self.prompt:  # much faster than the expression
            return False
        return bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", self.prompt))

    def object(self, schema: Json) -> Json:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise UnsupportedError(f"'required': {required!r}")
        missing = sorted(set(required) - set(properties))
        if missing:
            raise UnsupportedError(
                f"a required property without a schema: {missing[0]!r}"
            )
        made = {}
        for name, part in properties.items():
            try:
                made[name] = self.make(part, name)
            except _TooDeepError:
                if name in required:
                    raise
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        if len(made) < least or (most is not None and len(made) > most):
            raise UnsupportedError(
                "'minProperties' or 'maxProperties' beside 'properties'"
            )
        return made

    def array(self, schema: Json, name: str) -> list[Any]:
        first = [self.make(part, name) for part in schema.get("prefixItems", [])]
        least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        wanted = max(least, min(most, len(first) + 1))
        if least != int(least):
            raise UnsupportedError("'minItems' that is no integer")
        items = schema.get("items", {})
        try:
            while len(first) < wanted and items is not False:
                first.append(self.make(items, f"{name} {len(first) + 1}"))
        except _TooDeepError:
            if len(first) < least:
                raise
        if not least <= len(first) <= most:
            raise UnsupportedError("'minItems' or 'maxItems' that no array satisfies")
        return first

    def text(self, schema: Json, name: str) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if "format" in schema:
            known = FORMATS.get(schema["format"])
            if known is None or not least <= len(known) <= most:
                raise UnsupportedError(f"the format {schema['format']!r}")
            return known
        if not 0 <= least <= most:
            raise UnsupportedError("'minLength' below 0 or over 'maxLength'")
        self.spend(least)
        for quoted in self.texts:
            if least <= len(quoted) <= most:
                self.texts.remove(quoted)
                return str(quoted)
        text = f"{name} {digest(self.key, name)[:4]}"
        text = text[: int(min(most, len(text)))]
        return text.ljust(least, ".")

    def number(self, schema: Json, *, whole: bool) -> int | float:
        step = exact(schema["multipleOf"]) if "multipleOf" in schema else None
        if step is not None and step <= 0:
            raise UnsupportedError("'multipleOf' that is not above 0")
        if whole:  # the whole multiples of 3/2 are those of 3
            step = Fraction(step.numerator if step else 1)
        least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        above = schema.get("exclusiveMinimum", -math.inf)
        below = schema.get("exclusiveMaximum", math.inf)
        low, high = max(least, above), min(most, below)

        def fits(value: float) -> bool:
            return (
                least <= value <= most
                and above < value < below
                and (not whole or value == int(value))
                and (step is None or exact(value) % step == 0)
            )

        near = low if low > -math.inf else min(high, 0)
        candidates = [*self.numbers, 0, near, high, (low + high) / 2]
        # Far enough from a bound that is excluded, however large it is.
        candidates += [low + abs(low) + 1, high - abs(high) - 1]
        if step:
            first = math.ceil(exact(near) / step) * step
            multiples = [first, first + step, first - step]
            candidates += [
                int(m) if m.denominator == 1 else float(m) for m in multiples
            ]
        for value in candidates:
            if math.isfinite(value) and fits(value):
                if value in self.numbers:
                    self.numbers.remove(value)
                return int(value) if whole else value
        raise UnsupportedError("bounds that the stub finds no number for")


def only(schema: Json, known: set[str] | frozenset[str]) -> None:
    """Raise UnsupportedError for the first keyword that is not known here."""
    for keyword in schema:
        if keyword not in known and keyword not in IGNORED:
            raise UnsupportedError(f"the keyword {keyword!r}")


def is_of(value: object, kinds: object) -> bool:
    """Whether a value is of the type, or of one of the types."""
    kind = KINDS[type(value)]
    wanted = kinds if isinstance(kinds, list) else [kinds]
    return kinds is None or kind in wanted or (kind == "integer" and "number" in wanted)


def exact(value: float) -> Fraction:
    """The number as it is written, without what a float adds to it."""
    if not isinstance(value, int | float):
        raise TypeError(value)
    return Fraction(str(value))
