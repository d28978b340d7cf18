"""Instances of JSON schemas: the stub's answer when a request asks for JSON.

It supports most of what Pydantic 2, the OpenAI SDKs and LangChain send, and
rejects everything else. The same schema and prompt always give the same instance.
Where possible, values come from the prompt: its numbers and its quoted texts, in
order, and the enum values that it mentions.
"""

import json
import math
import re
from fractions import Fraction
from types import NoneType
from typing import Any

from pydantic import Field

from ..answers import answer
from ..stable import digest, normal, unit
from .errors import ApiError, Json
from .requests import ApiObject

MAX_RECURSION = 2  # how often a definition may contain itself
MAX_VALUES = 10_000  # in one instance, plus the characters that `minLength` requires
MAX_ENUM_VALUES = 1000  # the API's own limit

QUOTED_TEXT = re.compile(r"(?<!\w)(['\"`])(.{1,500}?)\1(?!\w)")
NUMBER = re.compile(r"(?<![\w.])-?\d{1,20}(?:\.\d+)?(?!\d)")

# Keywords that don't affect which values are valid. `nullable` comes from OpenAPI;
# the JavaScript SDK sends it for Zod 3.
ANNOTATIONS = frozenset(
    """
    $defs $schema default definitions deprecated description examples nullable
    readOnly title
    """.split()
)
BOUNDS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"format", "minLength", "maxLength"}),
    "integer": BOUNDS,
    "number": BOUNDS,
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": NoneType,
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
    """The stub can't make an instance of a schema; the message says why."""


class _RecursionTooDeepError(Exception):
    """A definition contains itself more than MAX_RECURSION times."""


class Schema(ApiObject):
    """A schema in a request: the answer must be an instance of it."""

    name: str
    description: str | None = None
    schema_: Json = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


def json_text(schema: Json, question: str, param: str) -> str:
    """An instance of the schema as JSON text.

    Raises an ApiError 400 that names `param` if the stub doesn't support the schema.
    """
    try:
        return json.dumps(
            instance(schema, question), ensure_ascii=False, allow_nan=False
        )
    except UnsupportedError as error:
        problem = str(error)
    except ValueError:
        problem = "NaN and Infinity are not JSON"
    message = f"Invalid schema in '{param}': {problem}."
    raise ApiError(400, message, param, "invalid_schema")


def json_object(prompt: str, question: str) -> str:
    """The answer in JSON mode: an object whose keys are the prompt's quoted words.

    Raises ApiError 400 if the prompt doesn't contain the word "json".
    """
    if "json" not in prompt.casefold():
        message = "'messages' must contain the word 'json' in some form."
        raise ApiError(400, message, "messages")
    keys = re.findall(r"[`'\"](\w+)[`'\"]", prompt) or ["answer"]
    return json.dumps(dict.fromkeys(keys, answer(question)), ensure_ascii=False)


def instance(schema: Json, prompt: str) -> Any:
    """A value that is valid against the schema.

    Raises UnsupportedError for a malformed schema, one that no value satisfies, and
    one that uses something the stub doesn't support.
    """
    try:
        return _Builder(schema, prompt).build(schema, "value")
    except _RecursionTooDeepError:
        raise UnsupportedError("a definition contains itself endlessly") from None
    except RecursionError:
        raise UnsupportedError("it is nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise UnsupportedError("one of its keywords has a malformed value") from None


class _Builder:
    """Builds one instance. `name` is the property that a value belongs to."""

    def __init__(self, root: Json, prompt: str) -> None:
        self.root, self.prompt = root, normal(prompt)
        self.key = digest(self.prompt)
        self.numbers = [
            float(text) if "." in text else int(text) for text in NUMBER.findall(prompt)
        ]
        self.texts = [text for _, text in QUOTED_TEXT.findall(prompt)]
        self.values = 0
        self.open_references: list[str] = []

    def build(self, schema: Any, name: str) -> Any:
        self.count_values(1)
        if not isinstance(schema, dict):
            raise UnsupportedError(f"{schema!r} is not a schema")
        if "$ref" in schema:
            reject_unknown_keywords(schema, {"$ref"})
            return self.follow_reference(str(schema["$ref"]), name)
        if "anyOf" in schema:
            reject_unknown_keywords(schema, {"anyOf"})
            return self.build_any_of(schema["anyOf"], name)
        if "const" in schema:
            reject_unknown_keywords(schema, {"const", "type"})
            return self.choose_value([schema["const"]], schema)
        if "enum" in schema:
            reject_unknown_keywords(schema, {"enum", "type"})
            return self.choose_value(schema["enum"], schema, name)
        kind = next((kind for kind in types_of(schema) if kind != "null"), "null")
        reject_unknown_keywords(schema, KEYWORDS[kind] | {"type"})
        match kind:
            case "object":
                return self.build_object(schema)
            case "array":
                return self.build_array(schema, name)
            case "string":
                return self.build_string(schema, name)
            case "integer" | "number":
                return self.build_number(schema, integer=kind == "integer")
            case "boolean":
                return unit(self.key, name) < 0.5
            case _:
                return None

    def count_values(self, more: int) -> None:
        self.values += more
        if self.values > MAX_VALUES:
            raise UnsupportedError(
                f"an instance would have more than {MAX_VALUES} values"
            )

    def follow_reference(self, reference: str, name: str) -> Any:
        if self.open_references.count(reference) >= MAX_RECURSION:
            raise _RecursionTooDeepError
        if reference != "#" and not reference.startswith("#/"):
            raise UnsupportedError(f"the reference {reference!r} is not supported")
        target: Any = self.root
        for step in reference.split("/")[1:]:
            if not isinstance(target, dict) or step not in target:
                raise UnsupportedError(f"the reference {reference!r} has no target")
            target = target[step]
        self.open_references.append(reference)
        try:
            return self.build(target, name)
        finally:
            self.open_references.pop()

    def build_any_of(self, options: list[Any], name: str) -> Any:
        """The first option whose recursion ends; null only if there is no other."""
        *others, last = sorted(options, key=lambda option: option == {"type": "null"})
        for option in others:
            try:
                return self.build(option, name)
            except _RecursionTooDeepError:
                continue
        return self.build(last, name)

    def choose_value(self, values: Any, schema: Json, name: str = "") -> Any:
        """A value of the schema's type: one that the prompt mentions, or else any."""
        if not isinstance(values, list):
            raise UnsupportedError(f"'enum' must be a list, not {values!r}")
        if len(values) > MAX_ENUM_VALUES:
            raise UnsupportedError(
                f"an enum has {len(values)} values, more than {MAX_ENUM_VALUES}"
            )
        if "type" in schema:
            types = types_of(schema)
            values = [one for one in values if any(has_type(one, t) for t in types)]
        if not values:
            raise UnsupportedError(
                "no value of an 'enum' or 'const' matches its 'type'"
            )
        for value in values:
            if isinstance(value, str) and self.mentions(normal(value)):
                return value
        return values[int(unit(self.key, name) * len(values))]

    def mentions(self, text: str) -> bool:
        """Whether the prompt contains this text as whole words."""
        if not text or text not in self.prompt:  # much faster than the regex
            return False
        return bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", self.prompt))

    def build_object(self, schema: Json) -> Json:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise UnsupportedError(f"'required' must be a list, not {required!r}")
        for name in required:
            if name not in properties:
                raise UnsupportedError(f"the required property {name!r} has no schema")
        built = {}
        for name, part in properties.items():
            try:
                built[name] = self.build(part, name)
            except _RecursionTooDeepError:
                if name in required:
                    raise
        return built

    def build_array(self, schema: Json, name: str) -> list[Any]:
        """The prefix items and one more, or as many as the limits require."""
        built = [self.build(part, name) for part in schema.get("prefixItems", [])]
        low, high = size(schema, "minItems", 0), size(schema, "maxItems", math.inf)
        target = max(low, min(high, len(built) + 1))
        try:
            while len(built) < target:
                item_name = f"{name} {len(built) + 1}"
                built.append(self.build(schema.get("items", {}), item_name))
        except _RecursionTooDeepError:
            if len(built) < low:
                raise
        if not low <= len(built) <= high:
            raise UnsupportedError("no array satisfies 'minItems' and 'maxItems'")
        return built

    def build_string(self, schema: Json, name: str) -> str:
        low, high = size(schema, "minLength", 0), size(schema, "maxLength", math.inf)
        if "format" in schema:
            example = FORMATS.get(schema["format"])
            if example is None or not low <= len(example) <= high:
                raise UnsupportedError(
                    f"the format {schema['format']!r} is not supported"
                )
            return example
        if low > high:
            raise UnsupportedError("'minLength' is greater than 'maxLength'")
        self.count_values(int(low))
        for quoted in self.texts:
            if low <= len(quoted) <= high:
                self.texts.remove(quoted)
                return str(quoted)
        text = f"{name} {digest(self.key, name)[:4]}"
        return text[: int(min(high, len(text)))].ljust(int(low), ".")

    def build_number(self, schema: Json, *, integer: bool) -> int | float:
        least = number(schema, "minimum", -math.inf)
        most = number(schema, "maximum", math.inf)
        above = number(schema, "exclusiveMinimum", -math.inf)
        below = number(schema, "exclusiveMaximum", math.inf)
        step = exact(number(schema, "multipleOf", 1))
        if step <= 0:
            raise UnsupportedError("'multipleOf' must be positive")
        any_fraction = not integer and "multipleOf" not in schema

        def fits(value: float) -> bool:
            return (
                least <= value <= most
                and above < value < below
                and (any_fraction or exact(value) % step == 0)
                and (not integer or value == int(value))
            )

        low, high = max(least, above), min(most, below)
        candidates = [*self.numbers, 0, low, high]
        if any_fraction:
            candidates += [(low + high) / 2, low + 1, high - 1]
        else:  # if any multiple fits, so does one next to a bound
            start = exact(low if low > -math.inf else min(high, 0))
            nearest = round(start / step) * step
            for multiple in (nearest - step, nearest, nearest + step):
                whole = multiple.denominator == 1
                candidates.append(int(multiple) if whole else float(multiple))
        for value in candidates:
            if fits(value):
                if value in self.numbers:
                    self.numbers.remove(value)
                return int(value) if integer else value
        raise UnsupportedError("the stub can't find a number within its bounds")


def reject_unknown_keywords(schema: Json, known: set[str] | frozenset[str]) -> None:
    """Raise UnsupportedError for a keyword that is neither known nor an annotation."""
    for keyword in schema:
        if keyword not in known and keyword not in ANNOTATIONS:
            raise UnsupportedError(f"the keyword {keyword!r} is not supported here")


def types_of(schema: Json) -> list[str]:
    """The types that a schema allows; without `type`, an object or a string."""
    types = schema.get("type", "object" if "properties" in schema else "string")
    names = types if isinstance(types, list) else [types]
    if not names or not all(name in KEYWORDS for name in names):
        raise UnsupportedError(f"the type {types!r} is not supported")
    return names


def has_type(value: object, kind: str) -> bool:
    """Whether a value has this JSON type. In Python, a bool is also an int."""
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, PYTHON_TYPES[kind])


def number(schema: Json, keyword: str, default: float) -> float:
    """The keyword's value. Raises UnsupportedError unless it's a finite number."""
    value: float = schema.get(keyword, default)
    if keyword in schema and not (has_type(value, "number") and math.isfinite(value)):
        raise UnsupportedError(f"{keyword!r} must be a finite number, not {value!r}")
    return value


def size(schema: Json, keyword: str, default: float) -> float:
    """The keyword's value. Raises UnsupportedError unless it's 0, 1, 2, …"""
    value = number(schema, keyword, default)
    if keyword in schema and not (has_type(value, "integer") and value >= 0):
        raise UnsupportedError(f"{keyword!r} must be 0, 1, 2, …, not {value!r}")
    return value


def exact(value: float) -> Fraction:
    """The number exactly as written in decimal: 0.1 is 1/10."""
    return Fraction(str(value))
