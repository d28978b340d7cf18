"""An instance for a JSON schema: what the stub says where JSON is asked for.

The same schema and prompt give the same instance. Values come from the prompt
where they can: its numbers and its quoted texts in their order, and those
members of an enum that it names.
"""

import math
import re
from typing import Any

from .behaviour import digest, normal, unit

Json = dict[str, Any]

DEEPEST = 2  # times that one definition may stand within itself
MOST = 10_000  # values in one instance, and characters in one text
# Read elsewhere, or without a bearing on what is valid.
IGNORED = frozenset(
    """
    $comment $defs $id $schema additionalProperties default definitions deprecated
    description examples properties readOnly required title type writeOnly
    """.split()
)
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
        self.root, self.prompt = root, prompt
        self.numbers = [
            float(text) for text in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", prompt)
        ]
        self.texts = re.findall(r"(?<!\w)['\"`](.+?)['\"`](?!\w)", prompt)
        self.made = 0
        self.open: list[str] = []  # the references that are being followed

    def make(self, schema: Any, name: str) -> Any:
        self.made += 1
        if self.made > MOST:
            raise UnsupportedError(f"a schema with more than {MOST} values")
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
            return schema["const"]
        if "enum" in schema:
            return self.member(list(schema["enum"]), name)
        kind = self.kind(schema)
        known = "number" if kind == "integer" else kind
        if known not in KEYWORDS:
            raise UnsupportedError(f"the type {kind!r}")
        only(schema, KEYWORDS[known])
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
                return unit(normal(self.prompt), name) < 0.5
            case _:
                return None

    def kind(self, schema: Json) -> Any:
        kinds = schema.get("type")
        if isinstance(kinds, list):  # a value rather than none
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
        if not reference.startswith("#"):
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

    def member(self, members: list[Any], name: str) -> Any:
        if not members:
            raise UnsupportedError("an empty 'enum'")
        for one in members:
            if isinstance(one, str) and normal(one) in normal(self.prompt):
                return one
        return members[int(unit(normal(self.prompt), name) * len(members))]

    def object(self, schema: Json) -> Json:
        properties = schema.get("properties", {})
        required = set(schema.get("required", ()))
        missing = sorted(required - set(properties))
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
        for quoted in self.texts:
            if least <= len(quoted) <= most:
                self.texts.remove(quoted)
                return str(quoted)
        if not 0 <= least <= min(most, MOST):
            raise UnsupportedError("'minLength' over 'maxLength', or too long")
        text = f"{name} {digest(normal(self.prompt), name)[:4]}"
        text = text[: int(min(most, len(text)))]
        return text.ljust(least, ".")

    def number(self, schema: Json, *, whole: bool) -> int | float:
        step = schema.get("multipleOf", 1 if whole else None)
        least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        above = schema.get("exclusiveMinimum", -math.inf)
        below = schema.get("exclusiveMaximum", math.inf)
        low, high = max(least, above), min(most, below)

        def fits(value: float) -> bool:
            return (
                least <= value <= most
                and above < value < below
                and (not whole or value == int(value))
                and (step is None or math.isclose(value / step, round(value / step)))
            )

        near = low if low > -math.inf else min(high, 0)
        candidates = [*self.numbers, 0, near, high, (low + high) / 2]
        if step:
            if whole and step != int(step):
                raise UnsupportedError("'multipleOf' that is no integer, of an integer")
            first = math.ceil(near / step) * step
            candidates += [first, first + step, first - step]
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
