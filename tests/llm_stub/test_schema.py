import datetime
import enum
import json
import math
import os
import re
import subprocess
import sys
from decimal import Decimal
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal, Optional
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import (
    UUID4,
    AnyUrl,
    Base64Bytes,
    BaseModel,
    Field,
    SecretStr,
    create_model,
)

from llm_stub.api import schema as api_schema
from llm_stub.api.errors import ApiError
from llm_stub.api.schema import FORMATS, KEYWORDS, UnsupportedError, check_schema

instance = partial(api_schema.instance, strict=True)
lenient_instance = partial(api_schema.instance, strict=False)
PROMPT = "Take 3, -4.5 and 120 of 'Ada' and \"Grace Hopper\", in green."
PROMPTS = ["", PROMPT]
property_test = settings(deadline=None, derandomize=True, max_examples=100)

Json = dict[str, Any]


def assert_valid(schema: Json, value: Any) -> None:
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(value)


# Random schemas made of supported constructs

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from("abc")
FLOATS = st.floats(-1e9, 1e9)
WHOLE_NUMBERS = st.integers(-1000, 1000)


@st.composite
def numbers(draw: st.DrawFn, kind: str) -> Json:
    """Bounds and steps that at least one number satisfies."""
    schema: Json = {"type": kind}
    steps = [1, 2, 7] if kind == "integer" else [0.25, 1.5, 3]
    step = draw(st.sampled_from([None, *steps]))
    if step is not None:
        schema["multipleOf"] = step
    valid = draw(FLOATS if kind == "number" and step is None else WHOLE_NUMBERS)
    valid *= step or 1
    distances = st.integers(0, 9) if step else st.floats(0, 9)
    for name, sign in (("Minimum", -1), ("Maximum", 1)):
        bound = valid + sign * draw(distances)
        keywords = ["", name.lower()]
        if bound != valid:
            keywords.append(f"exclusive{name}")
        if keyword := draw(st.sampled_from(keywords)):
            schema[keyword] = bound
    return schema


@st.composite
def sizes(draw: st.DrawFn, name: str, least: int = 0) -> Json:
    """`min…`, `max…`, both or neither; the maximum is at least `least`."""
    low, high = sorted([draw(st.integers(0, 9)), draw(st.integers(0, 9))])
    limits = {f"min{name}": low, f"max{name}": max(high, least)}
    keywords = draw(st.sets(st.sampled_from(sorted(limits))))
    return {keyword: limits[keyword] for keyword in keywords}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Json:
    prefix = draw(st.lists(inner, max_size=2))
    schema = {"type": "array", **draw(sizes("Items", len(prefix)))}
    if prefix:
        schema["prefixItems"] = prefix
    if draw(st.booleans()):
        schema["items"] = draw(inner)
    return schema


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Json:
    properties = draw(st.dictionaries(NAMES, inner))
    schema: Json = {"type": "object", "properties": properties}
    if properties:
        required = draw(st.sets(st.sampled_from(sorted(properties))))
        schema["required"] = sorted(required)
    if draw(st.booleans()):
        schema["additionalProperties"] = False
    return schema


def nullable(schema: Json) -> Json:
    return {**schema, "type": [schema["type"], "null"]}


LEAVES = st.one_of(
    st.sampled_from([{}, {"type": "boolean"}, {"type": "null"}]),
    numbers("integer"),
    numbers("number"),
    numbers("number").map(nullable),
    sizes("Length").map(lambda bounds: {"type": "string", **bounds}),
    sizes("Length").map(lambda bounds: {"type": ["null", "string"], **bounds}),
    st.sampled_from(sorted(FORMATS)).map(lambda f: {"type": "string", "format": f}),
    JSON_VALUES.map(lambda value: {"const": value}),
    st.lists(JSON_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)
REFERENCES = st.sampled_from("abc").map(lambda name: {"$ref": f"#/$defs/{name}"})


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            arrays(inner),
            objects(inner),
            objects(inner).map(nullable),
            st.lists(inner, min_size=1, max_size=3).map(lambda many: {"anyOf": many}),
        ),
        max_leaves=6,
    )


def with_definitions(
    roots: st.SearchStrategy[Any], definitions: st.SearchStrategy[Any]
) -> st.SearchStrategy[Json]:
    """Object schemas and the definitions that they may refer to."""
    defs = st.fixed_dictionaries(dict.fromkeys("abc", definitions))
    return st.builds(lambda root, defs: {**root, "$defs": defs}, objects(roots), defs)


@property_test
@given(with_definitions(nested(LEAVES | REFERENCES), LEAVES), st.sampled_from(PROMPTS))
def test_instance_is_valid(schema: Json, prompt: str) -> None:
    assert_valid(schema, instance(schema, prompt))


OPTIONAL = st.one_of(
    REFERENCES.map(lambda ref: {"anyOf": [ref, {"type": "null"}]}),
    REFERENCES.map(lambda ref: {"type": "array", "items": ref}),
    st.dictionaries(NAMES, REFERENCES, max_size=2).map(
        lambda refs: {"type": "object", "properties": refs}
    ),
)


@property_test
@given(with_definitions(REFERENCES, objects(LEAVES | OPTIONAL)))
def test_recursion_through_optional_values_ends(schema: Json) -> None:
    assert_valid(schema, instance(schema, PROMPT))


@property_test
@given(with_definitions(nested(LEAVES | REFERENCES), nested(LEAVES | REFERENCES)))
def test_any_recursion_gives_a_valid_instance_or_an_error(schema: Json) -> None:
    try:
        value = instance(schema, PROMPT)
    except UnsupportedError:
        return
    assert_valid(schema, value)


@property_test
@given(st.lists(nested(LEAVES | REFERENCES), min_size=2, max_size=3), LEAVES)
def test_combined_keywords_give_a_valid_instance_or_an_error(
    parts: list[Any], definition: Any
) -> None:
    schema: Json = {"$defs": dict.fromkeys("abc", definition)}
    for part in parts:
        schema |= part
    try:
        value = instance(schema, PROMPT)
    except UnsupportedError:
        return
    assert_valid(schema, value)


# Schemas that Pydantic generates


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Address(BaseModel):
    street: str = Field(description="including the house number")
    city: str = "Berlin"


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)
    home: Address
    work: Address | None = None
    favourite: Colour


class Tree(BaseModel):
    value: int
    children: list["Tree"]


class Node(BaseModel):
    value: str
    next: Optional["Node"]


class Employee(BaseModel):
    team: Optional["Team"]


class Team(BaseModel):
    members: Annotated[list[Employee], Field(min_length=1)]


class Sum(BaseModel):
    left: "Term"
    right: "Term"


class Product(BaseModel):
    left: "Term"
    right: "Term"


class Power(BaseModel):
    base: "Term"
    exponent: "Term"


class Negative(BaseModel):
    term: "Term"


class Number(BaseModel):
    value: float


Term = Sum | Product | Power | Negative | Number

TYPES = [
    str,
    int,
    float,
    bool,
    None,
    Any,
    list[int],
    dict[str, int],
    tuple[int, str, bool],
    str | None,
    int | str | None,
    list[Address] | None,
    Literal["low", "high"],
    Literal["only"],
    Literal[1, "two", None],
    Colour,
    Colour | None,
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    UUID,
    IPv4Address,
    IPv6Address,
    AnyUrl,
    Annotated[int, Field(gt=0)],
    Annotated[int, Field(lt=0)],
    Annotated[int, Field(gt=3, lt=5)],
    Annotated[int, Field(ge=7, multiple_of=5)],
    Annotated[float, Field(gt=0)],
    Annotated[float, Field(lt=-3)],
    Annotated[float, Field(gt=0, lt=1)],
    Annotated[Decimal, Field(gt=0)],
    Annotated[str, Field(min_length=40)],
    Annotated[str, Field(min_length=2, max_length=3)],
    Annotated[list[str], Field(min_length=3, max_length=4)],
    Annotated[list[int], Field(max_length=0)],
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["empty prompt", "prompt"])
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_pydantic_accepts_an_instance_for_each_field_type(
    kind: Any, prompt: str
) -> None:
    model = create_model("Model", field=(kind, ...), other=(kind, ...))
    schema = model.model_json_schema()
    value = instance(schema, prompt)
    assert_valid(schema, value)
    model.model_validate_json(json.dumps(value))


@pytest.mark.parametrize("model", [Person, Tree, Node, Team, Sum, Negative])
def test_pydantic_accepts_an_instance_of_each_model(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    value = instance(schema, PROMPT)
    assert_valid(schema, value)
    model.model_validate_json(json.dumps(value))


def test_recursive_model_gets_children_to_a_limited_depth() -> None:
    tree = Tree.model_validate(instance(Tree.model_json_schema(), PROMPT))
    assert tree.children
    depth = 0
    while tree.children:
        tree, depth = tree.children[0], depth + 1
    assert depth < 10


def test_optional_field_gets_a_value_instead_of_none() -> None:
    value = instance(Person.model_json_schema(), PROMPT)
    assert Person.model_validate(value).work is not None


# Schemas that the JavaScript SDK generates from Zod types


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"]},
        {"type": "string", "nullable": True},
        {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
        {"type": "number", "const": 1},
        {"$ref": "#/definitions/t", "definitions": {"t": {"type": "boolean"}}},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}},
            "required": ["kids"],
            "additionalProperties": False,
        },
    ],
    ids=["nullable", "Zod 3's nullable", "integer", "literal", "shared", "recursive"],
)
def test_instance_of_a_zod_schema_is_valid(schema: Json) -> None:
    for prompt in PROMPTS:
        assert_valid(schema, instance(schema, prompt))


# Where the values come from


def object_of(**properties: Any) -> Json:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required}


TEXT, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
SAMPLE = object_of(a=TEXT, b={"type": "boolean"}, c={"enum": list(range(9))})


def test_same_schema_and_prompt_give_the_same_instance() -> None:
    for prompt in PROMPTS:
        assert instance(SAMPLE, prompt) == instance(SAMPLE, prompt)


def test_values_vary_with_the_prompt() -> None:
    instances = [instance(SAMPLE, f"Why {number}?") for number in range(30)]
    for name in SAMPLE["properties"]:
        assert len({values[name] for values in instances}) > 1


def test_case_and_whitespace_of_the_prompt_do_not_matter() -> None:
    assert instance(SAMPLE, "Why is  it so?\n") == instance(SAMPLE, "why IS it so?")


@pytest.mark.parametrize(
    ("schema", "prompt", "expected"),
    [
        (object_of(a=INTEGER, b=INTEGER), "From 12 to 3.", {"a": 12, "b": 3}),
        (object_of(a=NUMBER, b=NUMBER), "-4.5 or 2", {"a": -4.5, "b": 2}),
        (object_of(a=INTEGER, b=NUMBER), "2.5 of 7", {"a": 7, "b": 2.5}),
        (object_of(a={**INTEGER, "minimum": 5}), "3 or 8", {"a": 8}),
        (object_of(a={**INTEGER, "multipleOf": 4}), "7 or 12", {"a": 12}),
        ({"type": "array", "items": INTEGER, "minItems": 3}, "1 2 3", [1, 2, 3]),
        (object_of(a=TEXT, b=TEXT), "'Ada' met \"Bob\".", {"a": "Ada", "b": "Bob"}),
        (object_of(a=TEXT), "Call it `x-1`.", {"a": "x-1"}),
        (object_of(a=TEXT), "Play \"Rock 'n' Roll\".", {"a": "Rock 'n' Roll"}),
        (object_of(a=TEXT), "It's Ada's, isn't it? 'Yes'", {"a": "Yes"}),
        (object_of(a={**TEXT, "maxLength": 3}), "'Grace' or 'Ada'", {"a": "Ada"}),
        (object_of(a=INTEGER), "1234567890123456789", {"a": 1234567890123456789}),
        (object_of(a=INTEGER), f"{'9' * 5000} or 7", {"a": 7}),
    ],
)
def test_numbers_and_quoted_texts_come_from_the_prompt_in_order(
    schema: Json, prompt: str, expected: Any
) -> None:
    assert instance(schema, prompt) == expected


def test_multiple_of_a_decimal_step_has_no_rounding_error() -> None:
    schema = {"type": "number", "minimum": 0.25, "multipleOf": 0.1}
    for prompt in ("", "0.3", "Between 1000000000.55 and 0.7"):
        assert Decimal(str(instance(schema, prompt))) % Decimal("0.1") == 0


@pytest.mark.parametrize(
    ("values", "prompt", "mentioned"),
    [
        (["red", "green"], "I like green.", "green"),
        (["Red", "Green"], "GREEN!", "Green"),
        (["celsius", "very hot"], "Is it very\nhot?", "very hot"),
        (["red", "green"], "I am bored by green.", "green"),
        (["", "green"], "I like green.", "green"),
        ([None, 1, "C++"], "Is C++ hard?", "C++"),
    ],
)
def test_enum_value_that_the_prompt_mentions_is_chosen(
    values: list[Any], prompt: str, mentioned: str
) -> None:
    assert instance({"enum": values}, prompt) == mentioned


# Errors


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"type": "string", "pattern": "^a(?=b)c$"}, "^a(?=b)c$"),
        ({"type": "string", "pattern": "("}, "("),
        ({"type": "string", "format": "regex"}, "regex"),
        ({"type": "string", "format": "date", "maxLength": 3}, "date"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "array", "items": False}, "False"),
        ({"type": "array", "items": [{}]}, "[{}]"),
        ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "propertyNames": {}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "object", "maxProperties": 1}, "maxProperties"),
        ({"type": "object", "required": ["a"]}, "'a'"),
        ({"type": "widget"}, "widget"),
        ({"oneOf": [{}]}, "oneOf"),
        ({"allOf": [{}]}, "allOf"),
        ({"anyOf": [{}], "minimum": 1}, "minimum"),
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"$ref": "other.json#/a"}, "other.json#/a"),
        ({"$ref": "#/$defs/none"}, "#/$defs/none"),
        ({"$ref": "#anchor"}, "#anchor"),
        ({"$dynamicRef": "#a"}, "$dynamicRef"),
        (True, "True"),
        (False, "False"),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
def test_error_names_the_unsupported_construct(
    schema: Any, name: str, nested: bool
) -> None:
    with pytest.raises(UnsupportedError) as error:
        instance(object_of(a=schema) if nested else schema, PROMPT)
    assert name in str(error.value)


A: Json = {"$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    "definition",
    [A, object_of(a=A), {"anyOf": [A, object_of(b=A)]}, {**TEXT, "anyOf": [A]}],
    ids=["itself", "required", "all options", "next to a type"],
)
def test_endless_recursion_is_an_error(definition: Json) -> None:
    with pytest.raises(UnsupportedError):
        instance({**A, "$defs": {"a": definition}}, PROMPT)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4},
        {"type": "integer", "minimum": 1, "maximum": 4, "multipleOf": 5},
        {"type": "number", "minimum": 1, "exclusiveMaximum": 1},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"type": "string", "const": 1},
        {"type": "integer", "enum": ["a", None, True]},
    ],
    ids=str,
)
def test_contradictory_schema_is_an_error(schema: Json) -> None:
    with pytest.raises(UnsupportedError):
        instance(schema, PROMPT)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": "x"},
        {"type": "string", "minLength": -1},
        {"type": "string", "maxLength": None},
        {"type": "string", "format": []},
        {"type": "object", "properties": 3},
        {"type": "object", "properties": ["a"]},
        {"type": "object", "properties": {"a": 3}},
        {"type": "object", "properties": {"a": {}}, "required": "a"},
        {"type": "object", "properties": {"a": {}}, "required": 3},
        {"type": "object", "properties": {"a": {}}, "required": [[]]},
        {"type": "array", "items": 5},
        {"type": "array", "prefixItems": 5},
        {"type": "array", "minItems": "x"},
        {"type": "array", "minItems": []},
        {"type": "array", "minItems": 1.5},
        {"type": "array", "minItems": True},
        {"type": "array", "maxItems": {}},
        {"type": "integer", "minimum": "x"},
        {"type": "integer", "exclusiveMaximum": [1]},
        {"type": "integer", "multipleOf": 0},
        {"type": "number", "multipleOf": 0},
        {"type": "number", "multipleOf": -1},
        {"type": "number", "multipleOf": "x"},
        {"type": "number", "minimum": True},
        {"type": "integer", "minimum": float("nan")},
        {"type": "number", "minimum": float("inf")},
        {"type": "number", "maximum": 10**400},
        {"type": {}},
        {"type": []},
        {"type": [[]]},
        {"enum": {}},
        {"enum": {"a": 1}},
        {"enum": 5},
        {"enum": []},
        {"anyOf": []},
        {"anyOf": 5},
        {"anyOf": {}},
        {"$ref": 7},
        {"$ref": "#", "$defs": 5},
        {"$ref": "#/$defs/a", "$defs": 5},
        5,
        None,
        [],
        "string",
    ],
    ids=str,
)
def test_malformed_schema_is_an_error(schema: Any) -> None:
    with pytest.raises(UnsupportedError):
        instance(schema, PROMPT)


ALL_KEYWORDS = sorted(
    frozenset().union(*KEYWORDS.values())
    | {"$ref", "$defs", "anyOf", "const", "enum", "type"}
)
EXTREMES = st.sampled_from([10**5, -(10**400), 10**400, 1e308, 5e-324, float("inf")])
POINTERS = st.sampled_from(["#", "#/$defs/a", "#/properties/a", "#a", "/", ""])
TYPE_NAMES = st.sampled_from(sorted(KEYWORDS))
JUNK = st.recursive(
    SCALARS | EXTREMES | POINTERS | TYPE_NAMES,
    lambda inner: (
        st.dictionaries(st.sampled_from([*ALL_KEYWORDS, "a"]), inner, max_size=4)
        | st.lists(inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(property_test, max_examples=300)
@given(
    st.dictionaries(st.sampled_from(ALL_KEYWORDS), JUNK, min_size=1, max_size=5),
    st.text("'\"` 019.-ab", max_size=20),
)
def test_random_keywords_give_an_instance_or_an_error(
    schema: Json, prompt: str
) -> None:
    try:
        value = instance(schema, prompt)
    except UnsupportedError:
        return
    json.dumps(value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"type": "array", "items": inner},
        lambda inner: {"type": "array", "prefixItems": [inner]},
        lambda inner: object_of(a=inner),
        lambda inner: {"anyOf": [inner]},
    ],
    ids=["items", "prefixItems", "properties", "anyOf"],
)
def test_schema_with_500_levels_is_an_error(wrap: Any) -> None:
    schema: Json = {}
    for _ in range(500):
        schema = wrap(schema)
    with pytest.raises(UnsupportedError):
        instance(schema, PROMPT)


# Schemas that aren't strict: OpenAI's models may ignore some of their keywords


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]


class Shop(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    tags: set[str]
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{4}$")]
    prices: dict[Literal["small", "large"], float]
    stock: Annotated[dict[str, int], Field(min_length=2)]
    logo: bytes
    folder: Path
    price: Decimal
    secret: SecretStr
    pair: tuple[int, str]
    numbers: Annotated[set[int], Field(min_length=3)]
    shares: Annotated[set[float], Field(min_length=2, max_length=2)]
    sizes: Annotated[set[Literal["small", "large"]], Field(min_length=2)]
    number: UUID4
    picture: Base64Bytes
    word: Annotated[str, Field(pattern=r"^\w+$", min_length=5)]
    anything: Any


@pytest.mark.parametrize("prompt", PROMPTS, ids=["no prompt", "prompt"])
def test_pydantic_accepts_the_instance_of_a_lenient_schema(prompt: str) -> None:
    value = lenient_instance(Shop.model_json_schema(), prompt)
    shop = Shop.model_validate_json(json.dumps(value))
    assert len(shop.stock) == 2


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "minProperties": 2, "patternProperties": {"^a": {}}},
        {"type": "array", "items": True, "minItems": 1, "contains": {}},
        {"allOf": [object_of(a=TEXT), object_of(b=INTEGER)]},
        {"oneOf": [TEXT, INTEGER], "description": "either"},
        {"type": "string", "format": "path"},
        {"type": "object", "required": ["a"]},
        {"type": "string", "if": {}, "then": {}},
    ],
    ids=str,
)
def test_lenient_schema_gets_a_valid_instance(schema: Json) -> None:
    assert_valid(schema, lenient_instance(schema, PROMPT))


def test_lenient_schema_with_an_unsupported_pattern_gets_any_text() -> None:
    for pattern in ("^a(?=b)c$", r"^\p{L}+$", "("):
        text = lenient_instance({"type": "string", "pattern": pattern}, "")
        assert isinstance(text, str)


# Patterns


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[A-Z]{2}\d{4}$",
        r"^[^a-z\s]+$",
        r"^(red|green)( light)?$",
        r"^\+?[0-9 ]{5,}$",
        # Zod 4's patterns for e-mail addresses and UUIDs
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9]"
        r"[A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        r"^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB]"
        r"[0-9a-fA-F]{3}-[0-9a-fA-F]{12})$",
    ],
)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["no prompt", "prompt"])
def test_text_matches_its_pattern(pattern: str, prompt: str) -> None:
    text = instance({"type": "string", "pattern": pattern}, prompt)
    assert re.search(pattern, text)


def test_quoted_text_that_matches_the_pattern_is_chosen() -> None:
    schema = {"type": "string", "pattern": "^[A-Z]"}
    assert instance(schema, "from 'here' to 'There'") == "There"


def test_text_for_a_pattern_is_the_same_in_every_process() -> None:
    code = (
        "from llm_stub.api.schema import text_matching\n"
        "print(text_matching(r'^[^abc]{9}\\w+$', 'seed'))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(texts) == 1


def test_format_and_pattern_are_both_satisfied() -> None:
    pattern = r"^[0-9a-f-]{36}$"
    schema = {"type": "string", "format": "uuid", "pattern": pattern}
    assert UUID(instance(schema, ""))


# What OpenAI refuses, whether or not the schema's function is called


def refusal(schema: Json, *, strict: bool) -> str:
    with pytest.raises(ApiError) as error:
        check_schema(schema, "function 'f'", "tools[0].parameters", strict=strict)
    assert error.value.status == 400
    details: Json = error.value.body["error"]
    assert details["code"] == "invalid_function_parameters"
    assert details["param"] == "tools[0].parameters"
    return str(details["message"])


CLOSED: Json = {**object_of(a=TEXT), "additionalProperties": False}


@pytest.mark.parametrize("schema", [{}, CLOSED, Person.model_json_schema()], ids=str)
def test_lenient_check_accepts_any_object(schema: Json) -> None:
    check_schema(schema, "function 'f'", "tools[0].parameters", strict=False)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("schema", [TEXT, {"anyOf": [CLOSED]}], ids=str)
def test_root_must_be_an_object(schema: Json, strict: bool) -> None:
    message = refusal(schema, strict=strict)
    assert "schema must be a JSON Schema of 'type: \"object\"'" in message


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (object_of(a=TEXT), "In context=(), 'additionalProperties' is required"),
        ({**CLOSED, "required": []}, "Missing 'a'"),
        (
            {**CLOSED, "properties": {"a": object_of(b=TEXT)}},
            "In context=('properties', 'a'), 'additionalProperties' is required",
        ),
        (
            {**CLOSED, "properties": {"a": {"oneOf": [TEXT]}}},
            "In context=('properties', 'a'), 'oneOf' is not permitted",
        ),
        (
            {**CLOSED, "properties": {"a": {"type": "array", "items": {"not": {}}}}},
            "In context=('properties', 'a', 'items'), 'not' is not permitted",
        ),
        (
            {**CLOSED, "$defs": {"x": {"anyOf": [{"allOf": [TEXT]}]}}},
            "In context=('$defs', 'x', 'anyOf', '0'), 'allOf' is not permitted",
        ),
        (
            {**CLOSED, "properties": {"a": {"type": "string", "format": "uri"}}},
            "In context=('properties', 'a'), 'uri' is not a valid format",
        ),
        (
            {**CLOSED, "properties": {"a": {"type": "string", "format": []}}},
            "In context=('properties', 'a'), '[]' is not a valid format",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_strict_schema_is_refused_with_openais_wording(
    schema: Json, message: str
) -> None:
    assert message in refusal(schema, strict=True)
    check_schema(schema, "function 'f'", "tools[0].parameters", strict=False)


def doubling(times: int) -> Json:
    """A short schema whose instance has 2 to the power of `times` values."""
    pairs = {
        f"d{n}": object_of(
            a={"$ref": f"#/$defs/d{n + 1}"}, b={"$ref": f"#/$defs/d{n + 1}"}
        )
        for n in range(times)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**pairs, f"d{times}": TEXT}}


def fully_connected(count: int) -> Json:
    """Definitions that each have all definitions as optional properties."""
    names = [f"d{n}" for n in range(count)]
    references = {name: {"$ref": f"#/$defs/{name}"} for name in names}
    definition = {"type": "object", "properties": references}
    return {"$ref": "#/$defs/d0", "$defs": dict.fromkeys(names, definition)}


LONG_ARRAY: Json = {"type": "array", "minItems": 9000}
WORDS = [f"word {number}" for number in range(1000)]
LONG_PROMPT = "Lorem ipsum " * 20_000
MEASURE_MEMORY = """
import json, sys, tracemalloc
from llm_stub.api.schema import UnsupportedError, instance
schema, prompt = json.load(sys.stdin)
tracemalloc.start()
try:
    instance(schema, prompt, strict=True)
except UnsupportedError:
    pass
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize(
    ("schema", "prompt"),
    [
        pytest.param({"type": "array", "minItems": 10**9}, "", id="items"),
        pytest.param({"type": "array", "minItems": math.inf}, "", id="infinite items"),
        pytest.param({"type": "string", "minLength": 10**9}, "", id="long string"),
        pytest.param(
            {**LONG_ARRAY, "items": {**TEXT, "minLength": 9000}}, "", id="long strings"
        ),
        pytest.param(
            {**LONG_ARRAY, "items": {**LONG_ARRAY, "items": LONG_ARRAY}},
            "",
            id="nested arrays",
        ),
        pytest.param(doubling(30), "", id="doubling"),
        pytest.param(fully_connected(9), "", id="fully connected"),
        pytest.param(TEXT, "'a " * 50_000, id="unclosed quotes"),
        pytest.param(
            {**LONG_ARRAY, "items": TEXT}, LONG_PROMPT, id="array, long prompt"
        ),
        pytest.param({**TEXT, "pattern": "(((a{99}){99}){99}){99}"}, "", id="pattern"),
        pytest.param(
            {**TEXT, "pattern": "^(a+)+$"}, "'" + "a" * 40 + "!'", id="slow pattern"
        ),
        pytest.param(
            {**TEXT, "pattern": "^(?!b)(a+)+$"},
            "'" + "a" * 40 + "!'",
            id="slow pattern with a lookaround",
        ),
        pytest.param({"enum": WORDS}, LONG_PROMPT, id="enum, long prompt"),
    ],
)
def test_no_schema_takes_long_or_much_memory(schema: Json, prompt: str) -> None:
    # In a child process, so that the timeout can kill it.
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY],
        input=json.dumps([schema, prompt]),
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert int(process.stdout) < 30_000_000
