import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
)

from helpers.connection import Provider

pytestmark = [  # both are between LangChain and the SDK, not about the stub
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),
    pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema"),
]

SuiteT = TypeVar("SuiteT", bound=type[ChatModelIntegrationTests])

SKIPPED = {
    "test_anthropic_inputs": "the format is Anthropic's",
    "test_audio_inputs": "the stub accepts text only",
    "test_image_inputs": "the stub accepts text only",
    "test_image_tool_message": "the stub accepts text only",
    "test_pdf_inputs": "the stub accepts text only",
    "test_pdf_tool_message": "the stub accepts text only",
    "test_stream_time": "a benchmark that needs recorded HTTP calls",
}


def without(reasons: dict[str, str]) -> Callable[[SuiteT], SuiteT]:
    """Remove tests from a suite, with reasons.

    Each is replaced by an object that pytest doesn't collect. Its xfail mark
    satisfies the suite's own check that no test is overridden without a reason.
    """

    def remove(suite: SuiteT) -> SuiteT:
        for name, reason in reasons.items():
            assert callable(getattr(suite, name))
            mark = pytest.mark.xfail(reason=reason).mark
            setattr(suite, name, SimpleNamespace(pytestmark=[mark]))
        return suite

    return remove


@pytest.fixture(autouse=True)
def no_latency(provider: Provider) -> None:
    provider.configure(first_token=0, per_token=0)


class ChatSuite(ChatModelIntegrationTests):
    chat_model_class = ChatOpenAI
    supports_json_mode = True
    model_override_value = "another-model"
    use_responses_api: bool

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "some-model",
            "use_responses_api": self.use_responses_api,
            "stream_usage": True,  # by default only if the URL is OpenAI's own
            # LangChain's clients share connections, but each test has its own loop.
            "default_headers": {"connection": "close"},
        }


@without(SKIPPED)
class TestChatCompletions(ChatSuite):
    use_responses_api = False


@without(SKIPPED)
class TestResponses(ChatSuite):
    use_responses_api = True


class TestEmbeddings(EmbeddingsIntegrationTests):
    embeddings_class = OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        # Otherwise it downloads a table to count tokens.
        return {"model": "some-model", "check_embedding_ctx_length": False}


FIRST_CALLS = """
from langchain_openai import ChatOpenAI
print(len(ChatOpenAI(timeout=30).batch(["Who wrote Hamlet?"] * 32)))
"""


def test_first_calls_of_a_process_can_run_in_many_threads(provider: Provider) -> None:
    # Pydantic 2.11.0 sometimes returned an empty response here: its models, which the
    # SDK builds at the first call, were not safe to build in several threads.
    provider.configure(first_token=0.05)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_CALLS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]

    outputs = [child.communicate(timeout=60) for child in children]

    assert outputs == [("32\n", "")] * 4
