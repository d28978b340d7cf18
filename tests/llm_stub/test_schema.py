import datetime
import enum
import json
import math
import subprocess
import sys
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Any, Literal, Optional
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import AnyUrl, BaseModel, Field, create_model

from llm_stub.api.schema import FORMATS, KEYWORDS, UnsupportedError, instance

PROMPT = "Take 3, -4.5 and 120 of 'Ada' and \"Grace Hopper\", in green."
PROMPTS = ["", PROMPT]
drawn = settings(deadline=None, derandomize=True, max_examples=100)

Json = dict[str, Any]


def assert_valid(schema: Json, made: Any) -> None:
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(made)


# Any schema of the constructs that are supported

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from("abc")
FLOATS = st.floats(-1e9, 1e9)
WHOLE = st.integers(-1000, 1000)


@st.composite
def numbers(draw: st.DrawFn, kind: str) -> Json:
    """Bounds and steps that one number, at least, fits."""
    schema: Json = {"type": kind}
    steps = [1, 2, 7] if kind == "integer" else [0.25, 1.5, 3]
    step = draw(st.sampled_from([None, *steps]))
    if step is not None:
        schema["multipleOf"] = step
    fitting = draw(FLOATS if kind == "number" and step is None else WHOLE)
    fitting *= step or 1
    distances = st.integers(0, 9) if step else st.floats(0, 9)
    for least, sign in ((True, -1), (False, 1)):
        bound = fitting + sign * draw(distances)
        names = ["", "minimum" if least else "maximum"]
        if bound != fitting:
            names.append("exclusiveMinimum" if least else "exclusiveMaximum")
        if name := draw(st.sampled_from(names)):
            schema[name] = bound
    return schema


@st.composite
def sizes(draw: st.DrawFn, what: str, least: int = 0) -> Json:
    low, high = sorted([draw(st.integers(0, 9)), draw(st.integers(0, 9))])
    both = {f"min{what}": low, f"max{what}": max(high, least)}
    kept = draw(st.sets(st.sampled_from(sorted(both))))
    return {name: both[name] for name in kept}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Json:
    first = draw(st.lists(inner, max_size=2))
    schema = {"type": "array", **draw(sizes("Items", len(first)))}
    if first:
        schema["prefixItems"] = first
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


def or_null(schema: Json) -> Json:
    return {**schema, "type": [schema["type"], "null"]}


LEAVES = st.one_of(
    st.sampled_from([True, {}, {"type": "boolean"}, {"type": "null"}]),
    numbers("integer"),
    numbers("number"),
    numbers("number").map(or_null),
    sizes("Length").map(lambda bounds: {"type": "string", **bounds}),
    sizes("Length").map(lambda bounds: {"type": ["null", "string"], **bounds}),
    st.sampled_from(sorted(FORMATS)).map(lambda f: {"type": "string", "format": f}),
    VALUES.map(lambda value: {"const": value}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)
REFERENCES = st.sampled_from("abc").map(lambda name: {"$ref": f"#/$defs/{name}"})


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            arrays(inner),
            objects(inner),
            objects(inner).map(or_null),
            st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
            inner.map(lambda one: {"allOf": [one]}),
        ),
        max_leaves=6,
    )


def rooted(
    roots: st.SearchStrategy[Any], definitions: st.SearchStrategy[Any]
) -> st.SearchStrategy[Json]:
    """Schemas that have the definitions to which they refer."""
    each = st.fixed_dictionaries(dict.fromkeys("abc", definitions))
    return st.builds(lambda root, defs: {**root, "$defs": defs}, objects(roots), each)


@drawn
@given(rooted(nested(LEAVES | REFERENCES), LEAVES), st.sampled_from(PROMPTS))
def test_an_instance_is_valid(schema: Json, prompt: str) -> None:
    assert_valid(schema, instance(schema, prompt))


OPTIONAL = st.one_of(
    REFERENCES.map(lambda one: {"anyOf": [one, {"type": "null"}]}),
    REFERENCES.map(lambda one: {"type": "array", "items": one}),
    st.dictionaries(NAMES, REFERENCES, max_size=2).map(
        lambda each: {"type": "object", "properties": each}
    ),
)


@drawn
@given(rooted(REFERENCES, objects(LEAVES | OPTIONAL)))
def test_a_recursive_definition_comes_to_an_end_where_it_can(schema: Json) -> None:
    assert_valid(schema, instance(schema, PROMPT))


@drawn
@given(rooted(nested(LEAVES | REFERENCES), nested(LEAVES | REFERENCES)))
def test_any_recursion_ends_in_an_instance_or_is_refused(schema: Json) -> None:
    try:
        made = instance(schema, PROMPT)
    except UnsupportedError:
        return
    assert_valid(schema, made)


@drawn
@given(st.lists(nested(LEAVES | REFERENCES), min_size=2, max_size=3), LEAVES)
def test_keywords_side_by_side_all_hold_or_are_refused(
    parts: list[Any], definition: Any
) -> None:
    schema: Json = {"$defs": dict.fromkeys("abc", definition)}
    for part in parts:
        schema |= {} if part is True else part
    try:
        made = instance(schema, PROMPT)
    except UnsupportedError:
        return
    assert_valid(schema, made)


# The schemas that pydantic writes


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Address(BaseModel):
    street: str = Field(description="with its number")
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
    Annotated[float, Field(gt=1e20)],
    Annotated[float, Field(gt=0, lt=1)],
    Annotated[Decimal, Field(gt=0)],
    Annotated[str, Field(min_length=40)],
    Annotated[str, Field(min_length=2, max_length=3)],
    Annotated[list[str], Field(min_length=3, max_length=4)],
    Annotated[list[int], Field(max_length=0)],
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["no prompt", "prompt"])
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_pydantic_takes_the_instance_of_a_field(kind: Any, prompt: str) -> None:
    model = create_model("Model", field=(kind, ...), other=(kind, ...))
    schema = model.model_json_schema()
    made = instance(schema, prompt)
    assert_valid(schema, made)
    model.model_validate_json(json.dumps(made))


@pytest.mark.parametrize("model", [Person, Tree, Node, Team, Sum, Negative])
def test_pydantic_takes_the_instance_of_a_model(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    made = instance(schema, PROMPT)
    assert_valid(schema, made)
    model.model_validate_json(json.dumps(made))


def test_a_recursive_model_has_a_child_and_an_end() -> None:
    tree = Tree.model_validate(instance(Tree.model_json_schema(), PROMPT))
    assert tree.children
    depth = 0
    while tree.children:
        tree, depth = tree.children[0], depth + 1
    assert depth < 10


def test_an_optional_field_has_a_value_rather_than_none() -> None:
    made = instance(Person.model_json_schema(), PROMPT)
    assert Person.model_validate(made).work is not None


# What the values are


def record(**properties: Any) -> Json:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required}


TEXT, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
DRAWN = record(a=TEXT, b={"type": "boolean"}, c={"enum": list(range(9))})


def test_the_same_schema_and_prompt_give_the_same_instance() -> None:
    for prompt in PROMPTS:
        assert instance(DRAWN, prompt) == instance(DRAWN, prompt)


def test_another_prompt_may_give_another_instance() -> None:
    made = [instance(DRAWN, f"Why {number}?") for number in range(30)]
    for name in DRAWN["properties"]:
        assert len({one[name] for one in made}) > 1


def test_case_and_white_space_of_a_prompt_do_not_matter() -> None:
    assert instance(DRAWN, "Why is  it so?\n") == instance(DRAWN, "why IS it so?")


@pytest.mark.parametrize(
    ("schema", "prompt", "expected"),
    [
        (record(a=INTEGER, b=INTEGER), "From 12 to 3.", {"a": 12, "b": 3}),
        (record(a=NUMBER, b=NUMBER), "-4.5 or 2", {"a": -4.5, "b": 2}),
        (record(a=INTEGER, b=NUMBER), "2.5 of 7", {"a": 7, "b": 2.5}),
        (record(a={**INTEGER, "minimum": 5}), "3 or 8", {"a": 8}),
        (record(a={**INTEGER, "multipleOf": 4}), "7 or 12", {"a": 12}),
        ({"type": "array", "items": INTEGER, "minItems": 3}, "1 2 3", [1, 2, 3]),
        (record(a=TEXT, b=TEXT), "'Ada' met \"Bob\".", {"a": "Ada", "b": "Bob"}),
        (record(a=TEXT), "Call it `x-1`.", {"a": "x-1"}),
        (record(a=TEXT), "Play \"Rock 'n' Roll\".", {"a": "Rock 'n' Roll"}),
        (record(a=TEXT), "It's Ada's, isn't it? 'Yes'", {"a": "Yes"}),
        (record(a={**TEXT, "maxLength": 3}), "'Grace' or 'Ada'", {"a": "Ada"}),
        (record(a=INTEGER), "1234567890123456789", {"a": 1234567890123456789}),
    ],
)
def test_numbers_and_quoted_texts_come_from_the_prompt_in_their_order(
    schema: Json, prompt: str, expected: Any
) -> None:
    assert instance(schema, prompt) == expected


def test_a_multiple_of_a_decimal_step_has_no_rounding_error() -> None:
    schema = {"type": "number", "minimum": 0.25, "multipleOf": 0.1}
    for prompt in ("", "0.3", "Between 1000000000.55 and 0.7"):
        assert Decimal(str(instance(schema, prompt))) % Decimal("0.1") == 0


@pytest.mark.parametrize(
    ("members", "prompt", "named"),
    [
        (["red", "green"], "I like green.", "green"),
        (["Red", "Green"], "GREEN!", "Green"),
        (["celsius", "very hot"], "Is it very\nhot?", "very hot"),
        (["red", "green"], "I am bored by green.", "green"),
        (["", "green"], "I like green.", "green"),
        ([None, 1, "C++"], "Is C++ hard?", "C++"),
    ],
)
def test_a_member_of_an_enum_that_the_prompt_names_is_taken(
    members: list[Any], prompt: str, named: str
) -> None:
    assert instance({"enum": members}, prompt) == named


# What is refused


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"type": "string", "pattern": "^a"}, "pattern"),
        ({"type": "string", "format": "regex"}, "regex"),
        ({"type": "string", "format": "date", "maxLength": 3}, "date"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "array", "items": False, "minItems": 1}, "minItems"),
        ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "propertyNames": {}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "object", "required": ["a"]}, "'a'"),
        ({"type": "widget"}, "widget"),
        ({"oneOf": [{}]}, "oneOf"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"anyOf": [{}], "minimum": 1}, "minimum"),
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"$ref": "other.json#/a"}, "other.json#/a"),
        ({"$ref": "#/$defs/none"}, "#/$defs/none"),
        ({"$ref": "#anchor"}, "#anchor"),
        ({"$dynamicRef": "#a"}, "$dynamicRef"),
        (False, "False"),
    ],
    ids=str,
)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "inside"])
def test_what_is_not_supported_is_refused_by_its_name(
    schema: Any, name: str, inside: bool
) -> None:
    with pytest.raises(UnsupportedError) as error:
        instance(record(a=schema) if inside else schema, PROMPT)
    assert name in str(error.value)


A: Json = {"$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    "definition",
    [A, record(a=A), {"anyOf": [A, record(b=A)]}, {**TEXT, "anyOf": [A]}],
    ids=["itself", "required", "all options", "beside a type"],
)
def test_a_definition_that_cannot_end_is_refused(definition: Json) -> None:
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
def test_what_nothing_satisfies_is_refused(schema: Json) -> None:
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
        {"type": "object", "minProperties": "x"},
        {"type": "array", "items": 5},
        {"type": "array", "prefixItems": 5},
        {"type": "array", "minItems": "x"},
        {"type": "array", "minItems": []},
        {"type": "array", "maxItems": {}},
        {"type": "integer", "minimum": "x"},
        {"type": "integer", "exclusiveMaximum": [1]},
        {"type": "integer", "multipleOf": 0},
        {"type": "number", "multipleOf": 0},
        {"type": "number", "multipleOf": -1},
        {"type": "number", "multipleOf": "x"},
        {"type": "integer", "minimum": float("nan")},
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
        {"allOf": {}},
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
def test_a_malformed_schema_is_refused(schema: Any) -> None:
    with pytest.raises(UnsupportedError):
        instance(schema, PROMPT)


KNOWN = sorted(
    frozenset().union(*KEYWORDS.values())
    | {"$ref", "$defs", "anyOf", "allOf", "const", "enum", "type"}
    | {"properties", "required", "additionalProperties"}
)
HUGE = st.sampled_from([10**5, -(10**400), 10**400, 1e308, 5e-324, float("inf")])
REFER = st.sampled_from(["#", "#/$defs/a", "#/properties/a", "#a", "/", ""])
KINDS = st.sampled_from(["object", "array", "string", "number", "integer", "null"])
TANGLES = st.recursive(
    SCALARS | HUGE | REFER | KINDS,
    lambda inner: (
        st.dictionaries(st.sampled_from([*KNOWN, "a"]), inner, max_size=4)
        | st.lists(inner, max_size=3)
    ),
    max_leaves=20,
)


@settings(drawn, max_examples=300)
@given(
    st.dictionaries(st.sampled_from(KNOWN), TANGLES, min_size=1, max_size=5),
    st.text("'\"` 019.-ab", max_size=20),
)
def test_whatever_stands_in_a_schema_it_is_followed_or_refused(
    schema: Json, prompt: str
) -> None:
    try:
        made = instance(schema, prompt)
    except UnsupportedError:
        return
    json.dumps(made)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"type": "array", "items": inner},
        lambda inner: {"type": "array", "prefixItems": [inner]},
        lambda inner: record(a=inner),
        lambda inner: {"anyOf": [inner]},
        lambda inner: {"allOf": [inner]},
    ],
    ids=["items", "prefixItems", "properties", "anyOf", "allOf"],
)
def test_a_schema_of_500_levels_is_refused(wrap: Any) -> None:
    schema: Json = {}
    for _ in range(500):
        schema = wrap(schema)
    with pytest.raises(UnsupportedError):
        instance(schema, PROMPT)


def doubled(times: int) -> Json:
    """A schema of few lines whose instance has 2 to the power of `times` parts."""
    pairs = {
        f"d{n}": record(
            a={"$ref": f"#/$defs/d{n + 1}"}, b={"$ref": f"#/$defs/d{n + 1}"}
        )
        for n in range(times)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**pairs, f"d{times}": TEXT}}


def meshed(count: int) -> Json:
    """Definitions, each with all others as its optional parts."""
    names = [f"d{n}" for n in range(count)]
    parts = {name: {"$ref": f"#/$defs/{name}"} for name in names}
    each = {"type": "object", "properties": parts}
    return {"$ref": "#/$defs/d0", "$defs": dict.fromkeys(names, each)}


MANY: Json = {"type": "array", "minItems": 9000}
WORDS = [f"word {number}" for number in range(9000)]
LONG = "Lorem ipsum " * 20_000
PROGRAM = """
import json, sys, tracemalloc
from llm_stub.api.schema import UnsupportedError, instance
schema, prompt = json.load(sys.stdin)
tracemalloc.start()
try:
    instance(schema, prompt)
except UnsupportedError:
    pass
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize(
    ("schema", "prompt"),
    [
        pytest.param({"type": "array", "minItems": 10**9}, "", id="items"),
        pytest.param({"type": "array", "minItems": math.inf}, "", id="endless items"),
        pytest.param({"type": "string", "minLength": 10**9}, "", id="text"),
        pytest.param({**MANY, "items": {**TEXT, "minLength": 9000}}, "", id="texts"),
        pytest.param({**MANY, "items": {**MANY, "items": MANY}}, "", id="nested"),
        pytest.param(doubled(30), "", id="doubled"),
        pytest.param(meshed(9), "", id="meshed"),
        pytest.param(TEXT, "'a " * 50_000, id="quotation marks"),
        pytest.param({**MANY, "items": TEXT}, LONG, id="items, long prompt"),
        pytest.param({"enum": WORDS}, LONG, id="members, long prompt"),
    ],
)
def test_no_schema_takes_long_or_much_memory(schema: Json, prompt: str) -> None:
    ended = subprocess.run(  # its own process: one that goes astray can be killed
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([schema, prompt]),
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert int(ended.stdout) < 30_000_000
