import contextlib
import http.client
import json
import threading
from collections.abc import Callable
from typing import Any, get_args

import openai
import pytest
from openai import OpenAI
from openai.types import Completion

from helpers.connection import Provider
from llm_stub.settings import Fault, Settings
from tests.llm_stub.conftest import finished_attempts, without_ids

# Validation


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_token", -1),
        ("first_token", "1"),
        ("first_token", float("nan")),
        ("first_token", float("inf")),
        ("per_token", 3601),
        ("per_token", None),
        ("jitter", 1.01),
        ("jitter", -0.01),
        ("seed", 1.5),
        ("seed", True),
        ("models", []),
        ("models", "gpt-4"),
        ("models", [5]),
        ("latency", 1),
        ("tail", -0.1),
        ("tail", 3.1),
        ("keys", []),
        ("capacity", 0),
        ("capacity", 1.5),
        ("capacity", True),
        ("requests_per_minute", 0),
        ("requests_per_minute", "60"),
        ("tokens_per_minute", -1),
        ("tokens_per_minute", float("inf")),
        ("burst", 0),
        ("burst", 3601),
        ("faults", ["reset"]),
        ("faults", {"boom": 0.1}),
        ("faults", {"reset": 1.1}),
        ("faults", {"reset": 0.6, "hang": 0.5}),
        ("faults_by_prompt", {"Why?": "reset"}),
        ("faults_by_prompt", {"Why?": ["boom"]}),
        ("slow", -1),
        ("batch_speed", 0),
        ("batch_window", 0),
        ("batch_window", 86_401),
        ("max_calls", -1),
        ("max_tokens", 0.5),
        ("max_answer_tokens", 0),
    ],
)
def test_invalid_setting_is_rejected_with_its_name_and_value_and_changes_nothing(
    provider: Provider, name: str, value: Any
) -> None:
    before = provider.configure()
    with pytest.raises(ValueError, match=name) as error:
        provider.configure(**{"seed": 7} | {name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert provider.configure() == before


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"error_500": 0.6, "reset": 0.5}, "the rates add up to more than 1"),
        ({"boom": 0.5}, "'slow' or 'hang'"),
        ({"reset": 1.1}, "less than or equal to 1"),
        ({"reset": -0.1}, "greater than or equal to 0"),
    ],
    ids=["sum over 1", "unknown", "over 1", "below 0"],
)
def test_error_says_why_fault_rates_are_invalid(
    provider: Provider, faults: dict[str, float], reason: str
) -> None:
    before = provider.configure()
    with pytest.raises(ValueError, match="faults=") as error:
        provider.configure(faults=faults)
    assert str(faults) in str(error.value)
    assert reason in str(error.value)
    assert provider.configure() == before


def test_error_for_an_unknown_fault_lists_the_known_ones(provider: Provider) -> None:
    with pytest.raises(ValueError, match="boom") as error:
        provider.configure(faults_by_prompt={"Why?": ["boom"]})
    assert all(f"'{name}'" in str(error.value) for name in get_args(Fault))


def test_error_for_an_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="latency=1") as error:
        Settings().changed({"latency": 1})
    assert all(name in str(error.value) for name in Settings.model_fields)


# Changes


def test_change_keeps_the_other_settings() -> None:
    before = Settings(seed=3)
    changed = before.changed({"jitter": 0, "models": ["m"]})
    assert changed == Settings(seed=3, jitter=0, models=["m"])
    assert before == Settings(seed=3)


def test_change_applies_to_calls_that_arrive_after_it(
    provider: Provider, client: OpenAI, until_in_flight: Callable[[int], None]
) -> None:
    def complete() -> None:
        client.completions.create(model="m", prompt="Why?")

    provider.configure(first_token=1, per_token=0, jitter=0)
    earlier = threading.Thread(target=complete)
    earlier.start()
    until_in_flight(1)
    provider.configure(first_token=0)
    complete()
    earlier.join()

    slow, fast = finished_attempts(provider)
    assert (slow["state"], fast["state"]) == ("answered", "answered")
    assert slow["end"] - slow["arrival"] >= 1
    assert fast["end"] < slow["end"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"keys": ["other"]}, openai.AuthenticationError),
        ({"models": ["other"]}, openai.NotFoundError),
        ({"tokens_per_minute": 1}, openai.RateLimitError),
        ({"faults": {"error_503": 1}, "per_token": 9}, openai.InternalServerError),
        (
            {"faults_by_prompt": {"Why?": ["reset"]}, "seed": 1, "tail": 3},
            openai.APIConnectionError,
        ),
    ],
    ids=["keys", "models", "limits", "faults", "faults by prompt"],
)
def test_call_in_flight_keeps_the_settings_it_started_with(
    provider: Provider,
    client: OpenAI,
    changes: dict[str, Any],
    error: type[Exception],
) -> None:
    def start_stream() -> openai.Stream[Completion]:
        return client.completions.create(model="m", prompt="Why?", stream=True)

    provider.configure(first_token=0, per_token=0.02, jitter=0)
    expected, earlier = list(start_stream()), start_stream()
    provider.configure(**changes)
    with pytest.raises(error):
        start_stream()
    assert without_ids(list(earlier)) == without_ids(expected)


@pytest.mark.parametrize(
    "change",
    [{"models": ["other"]}, {"tokens_per_minute": 1}, {"faults": {"error_500": 1}}],
    ids=["models", "limits", "faults"],
)
def test_change_does_not_apply_to_a_call_whose_body_is_still_arriving(
    provider: Provider,
    until_in_flight: Callable[[int], None],
    change: dict[str, Any],
) -> None:
    body = json.dumps({"model": "m", "prompt": "Why?"}).encode()
    address = provider.url.removeprefix("http://")
    provider.configure(first_token=0, per_token=0)
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        until_in_flight(1)
        provider.configure(**change)
        connection.send(body)
        assert connection.getresponse().status == 200
