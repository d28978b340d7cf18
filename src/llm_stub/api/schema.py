"""Instances of JSON schemas: the stub's answer when a request asks for JSON.

A strict schema may use only what OpenAI's structured outputs support. In any other
schema, the stub ignores keywords that it doesn't know, as OpenAI's models may.
The same schema and prompt always give the same instance. Where possible, values
come from the prompt: its numbers and its quoted texts, in order, and the enum values
that it mentions.

Source: OpenAI's guide *Structured outputs*, section *Supported schemas*.
"""

import json
import math
import random
import re
from collections.abc import Iterator, Set
from fractions import Fraction
from itertools import chain
from types import NoneType
from typing import Annotated, Any

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError
from rstr import Rstr

from ..answers import answer
from ..stable import digest, normal, unit
from .errors import ApiError, Json
from .requests import ApiObject, Name

MAX_RECURSION = 2  # how often a definition may contain itself
MAX_VALUES = 10_000  # in one instance, plus the characters that `minLength` requires
MAX_ENUM_VALUES = 1000  # the API's own limit
ATTEMPTS = 10  # to generate a string that matches a pattern

QUOTED_TEXT = re.compile(r"(?<!\w)(['\"`])(.{1,500}?)\1(?!\w)")
NUMBER = re.compile(r"(?<![\w.])-?\d{1,20}(?:\.\d+)?(?!\d)")

# Keywords of a strict schema. These don't affect which values are valid. `nullable`
# comes from OpenAPI; the JavaScript SDK sends it for Zod 3.
ANNOTATIONS = frozenset(
    """
    $defs $schema default definitions deprecated description examples nullable
    readOnly title
    """.split()
)
COMBINED = frozenset({"$ref", "anyOf", "const", "enum", "type"})
BOUNDS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"format", "minLength", "maxLength", "pattern"}),
    "integer": BOUNDS,
    "number": BOUNDS,
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
STRICT_KEYWORDS = ANNOTATIONS.union(COMBINED, *KEYWORDS.values()) - {"prefixItems"}
MAX_STRICT_LEVELS = 10  # of objects in a strict schema
MAX_STRICT_PROPERTIES = 5000  # in a strict schema
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": NoneType,
}
STRICT_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "P1D",
    "email": "stub@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
FORMATS = STRICT_FORMATS | {  # also Pydantic's, for schemas that aren't strict
    "base64": "c3R1Yg==",
    "base64url": "c3R1Yg==",
    "uri": "https://example.com/",
    "uuid4": "00000000-0000-4000-8000-000000000000",
}


class UnsupportedError(Exception):
    """The stub can't make an instance of a schema; the message says why."""


class _RecursionTooDeepError(Exception):
    """A definition contains itself more than MAX_RECURSION times."""


class Schema(ApiObject):
    """A schema in a request: the answer must be an instance of it."""

    name: Name
    description: str | None = None
    schema_: Json = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


def check_schema(schema: Json, where: str, param: str, *, strict: bool) -> None:
    """Raise ApiError 400, in OpenAI's wording, for a schema that OpenAI refuses.

    The root must be an object. If the schema is `strict`, all keywords must be
    supported, and every object must require all its properties and no others.
    """
    kind, problem = schema.get("type"), None
    if (schema or strict) and kind != "object" and "$ref" not in schema:
        problem = (
            "schema must be a JSON Schema of 'type: \"object\"', got 'type: "
            f'"{kind}"\''
        )
    if strict and not problem:
        try:
            problem = next(_strict_problems(schema, ()), None)
            if not problem and count_properties(schema) > MAX_STRICT_PROPERTIES:
                problem = f"it has more than {MAX_STRICT_PROPERTIES} properties"
        except RecursionError:
            problem = "it is nested too deeply"
    if problem:
        message = f"Invalid schema for {where}: {problem}."
        code = "invalid_function_parameters" if where.startswith("function") else None
        raise ApiError(400, message, param, code)


def _strict_problems(
    schema: Any, path: tuple[str, ...], depth: int = 0
) -> Iterator[str]:
    """The problems of a strict schema, outermost first."""
    if not isinstance(schema, dict):
        yield f"In context={path}, {schema!r} is not a schema"
        return
    for keyword in schema:
        if keyword not in STRICT_KEYWORDS:
            yield f"In context={path}, '{keyword}' is not permitted"
    beside_reference = schema.keys() - {"$ref", "$defs", "definitions", "$schema"}
    if "$ref" in schema and beside_reference:
        names = ", ".join(map(repr, sorted(beside_reference)))
        yield f"In context={path}, $ref cannot have keywords {{{names}}}"
    if schema.get("type") == "array" and "items" not in schema:
        yield f"In context={path}, array schema missing items"
    if depth > MAX_STRICT_LEVELS:
        yield f"In context={path}, more than {MAX_STRICT_LEVELS} levels of nesting"
    if schema.get("format", "date") not in list(STRICT_FORMATS):
        yield f"In context={path}, '{schema['format']}' is not a valid format"
    if not {"type", "$ref", "anyOf"} & schema.keys():
        yield f"In context={path}, schema must have a 'type' key"
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        yield f"In context={path}, 'properties' must be an object"
        return
    if schema.get("type") == "object" or properties:
        if schema.get("additionalProperties") is not False:
            yield (
                f"In context={path}, 'additionalProperties' is required to be supplied "
                "and to be false"
            )
        required = schema.get("required", [])
        for name in properties:
            if not isinstance(required, list) or name not in required:
                yield (
                    f"In context={path}, 'required' is required to be supplied and to "
                    f"be an array including every key in properties. Missing '{name}'"
                )
    parts: list[tuple[tuple[str, ...], Any]] = [
        (("properties", name), part) for name, part in properties.items()
    ]
    for keyword in ("$defs", "definitions"):
        if isinstance(schema.get(keyword), dict):
            parts += [((keyword, name), one) for name, one in schema[keyword].items()]
    for keyword in ("anyOf",):
        if isinstance(schema.get(keyword), list):
            parts += [
                ((keyword, str(index)), one)
                for index, one in enumerate(schema[keyword])
            ]
    if "items" in schema:
        parts.append((("items",), schema["items"]))
    for step, part in parts:
        deeper = depth + (step[0] == "properties")
        yield from _strict_problems(part, (*path, *step), deeper)


def count_properties(schema: Any) -> int:
    """How many properties all objects in the schema have together."""
    if isinstance(schema, list):
        return sum(map(count_properties, schema))
    if not isinstance(schema, dict):
        return 0
    own = schema.get("properties")
    count = len(own) if isinstance(own, dict) else 0
    return count + sum(map(count_properties, schema.values()))


def json_text(schema: Json, question: str, param: str, *, strict: bool) -> str:
    """An instance of the schema as JSON text.

    Raises an ApiError 400 that names `param` if the stub doesn't support the schema.
    """
    try:
        return json.dumps(
            instance(schema, question, strict=strict),
            ensure_ascii=False,
            allow_nan=False,
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


def instance(schema: Json, prompt: str, *, strict: bool) -> Any:
    """A value that is valid against the schema.

    Unless the schema is `strict`, the value may violate keywords that the stub
    doesn't know. Raises UnsupportedError for a malformed schema, one that no value
    satisfies, and a strict one that uses something the stub doesn't support.
    """
    try:
        return _Builder(schema, prompt, strict=strict).build(schema, "value")
    except _RecursionTooDeepError:
        raise UnsupportedError("a definition contains itself endlessly") from None
    except RecursionError:
        raise UnsupportedError("it is nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise UnsupportedError("one of its keywords has a malformed value") from None


class _Builder:
    """Builds one instance. `name` is the property that a value belongs to."""

    def __init__(self, root: Json, prompt: str, *, strict: bool) -> None:
        self.root, self.prompt, self.strict = root, normal(prompt), strict
        self.key = digest(self.prompt)
        self.numbers = [
            float(text) if "." in text else int(text) for text in NUMBER.findall(prompt)
        ]
        self.texts = [text for _, text in QUOTED_TEXT.findall(prompt)]
        self.values = 0
        self.avoided: list[Any] = []  # the earlier items of an array of unique items
        self.taken: Set[float] = frozenset()  # the numbers among them
        self.open_references: list[str] = []

    def build(self, schema: Any, name: str) -> Any:
        self.count_values(1)
        if schema is True and not self.strict:
            schema = {}
        if not isinstance(schema, dict):
            raise UnsupportedError(f"{schema!r} is not a schema")
        if "$ref" in schema:
            self.check_keywords(schema, {"$ref"})
            return self.follow_reference(str(schema["$ref"]), name)
        if "allOf" in schema and not self.strict:
            return self.build(merged(schema), name)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                self.check_keywords(schema, {"anyOf"})
                return self.build_any_of(schema[keyword], name)
        if "const" in schema:
            self.check_keywords(schema, {"const", "type"})
            return self.choose_value([schema["const"]], schema)
        if "enum" in schema:
            self.check_keywords(schema, {"enum", "type"})
            return self.choose_value(schema["enum"], schema, name)
        kind = next((kind for kind in types_of(schema) if kind != "null"), "null")
        self.check_keywords(schema, KEYWORDS[kind] | {"type"})
        match kind:
            case "object":
                return self.build_object(schema, name)
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

    def check_keywords(self, schema: Json, known: Set[str]) -> None:
        """Raise UnsupportedError if a strict schema has any other keyword here."""
        for keyword in schema if self.strict else ():
            if keyword not in known and keyword not in ANNOTATIONS:
                raise UnsupportedError(f"the keyword {keyword!r} is not supported here")

    def count_values(self, more: int) -> None:
        self.check_room(more)
        self.values += more

    def check_room(self, more: int) -> None:
        if self.values + more > MAX_VALUES:
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
        values = [one for one in values if one not in self.avoided] or values
        for value in values:
            if isinstance(value, str) and self.mentions(normal(value)):
                return value
        return values[int(unit(self.key, name) * len(values))]

    def mentions(self, text: str) -> bool:
        """Whether the prompt contains this text as whole words."""
        if not text or text not in self.prompt:  # much faster than the regex
            return False
        return bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", self.prompt))

    def build_object(self, schema: Json, name: str) -> Json:
        """Build all properties, and as many more as `minProperties` requires."""
        properties = {**schema.get("properties", {})}
        keys = schema.get("propertyNames", {}).get("enum", [])
        missing = int(size(schema, "minProperties", 0)) - len(properties)
        self.check_room(missing)
        for number in range(missing):
            key = keys[number] if number < len(keys) else f"{name} {number + 1}"
            properties[key] = schema.get("additionalProperties", {"type": "string"})
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise UnsupportedError(f"'required' must be a list, not {required!r}")
        for name in required:
            if not isinstance(name, str):
                raise UnsupportedError(f"'required' must list names, not {name!r}")
            if name not in properties and self.strict:
                raise UnsupportedError(f"the required property {name!r} has no schema")
            properties.setdefault(name, {})
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
        unique = schema.get("uniqueItems") is True
        taken = {item for item in built if isinstance(item, int | float)}
        try:
            while len(built) < target:
                item_name = f"{name} {len(built) + 1}"
                if unique:
                    self.avoided, self.taken = built, taken
                else:
                    self.avoided, self.taken = [], frozenset()
                item = self.build(schema.get("items", {}), item_name)
                built.append(item)
                if isinstance(item, int | float):
                    taken.add(item)
        except _RecursionTooDeepError:
            if len(built) < low:
                raise
        finally:
            self.avoided, self.taken = [], frozenset()
        if not low <= len(built) <= high:
            raise UnsupportedError("no array satisfies 'minItems' and 'maxItems'")
        return built

    def build_string(self, schema: Json, name: str) -> str:
        low, high = size(schema, "minLength", 0), size(schema, "maxLength", math.inf)
        if low > high:
            raise UnsupportedError("'minLength' is greater than 'maxLength'")
        self.count_values(int(low))
        pattern = self.pattern(schema)

        def fits(text: str) -> bool:
            matches = pattern is None or pattern.matches(text)
            return low <= len(text) <= high and matches

        if "format" in schema:
            example = FORMATS.get(schema["format"])
            if example is not None and fits(example):
                return example
            if self.strict and pattern is None:
                raise UnsupportedError(
                    f"the format {schema['format']!r} is not supported"
                )
        for quoted in self.texts:
            if fits(quoted):
                self.texts.remove(quoted)
                return str(quoted)
        text = f"{name} {digest(self.key, name)[:4]}"
        text = text[: int(min(high, len(text)))].ljust(int(low), ".")
        if pattern is None or fits(text):
            return text
        for attempt in range(ATTEMPTS):
            seed = digest(self.key, name, attempt)
            made = text_matching(pattern.source, seed, repeats=attempt + 1)
            if low <= len(made) <= high and pattern.is_matched_by_its_own(made):
                return made
        if not self.strict:
            return text
        raise UnsupportedError(
            f"the stub can't generate a string for the pattern {pattern.source!r}. "
            "Put a matching one into the prompt, in quotes"
        )

    def pattern(self, schema: Json) -> "_Pattern | None":
        """The string's pattern; a lenient schema's is ignored if it is invalid."""
        if "pattern" not in schema:
            return None
        try:
            return _Pattern(schema["pattern"])
        except re.error:
            if self.strict:
                raise UnsupportedError(
                    f"the pattern {schema['pattern']!r} is not supported"
                ) from None
            return None

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
                and value not in self.taken
                and (any_fraction or exact(value) % step == 0)
                and (not integer or value == int(value))
            )

        low, high = max(least, above), min(most, below)
        candidates = [*self.numbers, 0, low, high]
        if any_fraction:
            candidates += [(low + high) / 2, low + 1, high - 1]
        # If any multiple fits, so does one next to a bound or to a taken one. The last
        # of them come first, because the earlier ones are usually taken.
        start = exact(low if low > -math.inf else min(high, 0))
        nearest = round(start / step) * step
        taken = len(self.taken)
        for value in chain(
            candidates,
            multiples(nearest, step, range(max(-1, taken - 2), taken + 2)),
            multiples(nearest, step, range(-1, taken - 2)),
        ):
            if fits(value):
                if value in self.numbers:
                    self.numbers.remove(value)
                return int(value) if integer else value
        raise UnsupportedError("the stub can't find a number within its bounds")


def multiples(start: Fraction, step: Fraction, counts: range) -> Iterator[float]:
    """These multiples of a step, counted from the start; whole ones as integers."""
    for count in counts:
        value = start + count * step
        yield int(value) if value.denominator == 1 else float(value)


class _Pattern:
    """A regular expression; raises re.error if it is invalid.

    Python's engine can take forever, so texts are matched by Pydantic's, which takes
    linear time. That one has no lookarounds: with them, only a text that was made for
    the pattern is matched, by Python's engine, because it is short and should match.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._linear: TypeAdapter[str] | None = None
        try:
            constraint = StringConstraints(pattern=source)
            self._linear = TypeAdapter(Annotated[str, constraint])
        except SchemaError:
            re.compile(source)

    def matches(self, text: str) -> bool:
        """Whether any text matches; False if that can't be found out quickly."""
        if self._linear is None:
            return False
        try:
            self._linear.validate_python(text)
        except ValidationError:
            return False
        return True

    def is_matched_by_its_own(self, text: str) -> bool:
        """Whether a text that was made for the pattern matches it."""
        if self._linear is None:
            return bool(text) and bool(re.search(self.source, text))
        return self.matches(text)


class _Short(random.Random):
    """Makes the strings from rstr short, and the same in every run.

    A repeated part occurs `repeats` times, or as close to that as the pattern allows.
    """

    def __init__(self, seed: str, repeats: int) -> None:
        super().__init__(seed)
        self.left, self.repeats = MAX_VALUES, repeats

    def randint(self, a: int, b: int) -> int:
        repeats = min(max(a, self.repeats), b)
        self.left -= repeats + 1
        if self.left < 0:
            raise OverflowError("the string would be too long")
        return repeats

    def choice(self, seq: Any) -> Any:
        # rstr puts the characters of a class into a set, which has no fixed order.
        return super().choice(sorted(seq) if isinstance(seq[0], str) else seq)


def text_matching(pattern: str, seed: str, repeats: int = 1) -> str:
    """A short string that matches the pattern; '' if rstr can't generate one."""
    try:
        text: str = Rstr(_Short(seed, repeats)).xeger(pattern)
    except (
        *(ArithmeticError, LookupError, RecursionError, TypeError, ValueError),
        re.error,
    ):
        return ""
    return text


def merged(schema: Json) -> Json:
    """The schema with all parts of `allOf` merged into it."""
    found: Json = {}
    for part in [*schema["allOf"], {k: v for k, v in schema.items() if k != "allOf"}]:
        for keyword, value in part.items():
            before = found.get(keyword)
            if isinstance(before, dict) and isinstance(value, dict):
                value = before | value
            elif keyword == "required" and isinstance(before, list):
                value = before + value
            found[keyword] = value
    return found


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
