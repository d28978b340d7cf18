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

pytestmark = [  # both tell how LangChain and the SDK work together
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),
    pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema"),
]

SuiteT = TypeVar("SuiteT", bound=type[ChatModelIntegrationTests])

LEFT_OUT = {
    "test_anthropic_inputs": "the format is another provider's",
    "test_audio_inputs": "the provider takes text only",
    "test_image_inputs": "the provider takes text only",
    "test_image_tool_message": "the provider takes text only",
    "test_pdf_inputs": "the provider takes text only",
    "test_pdf_tool_message": "the provider takes text only",
    "test_stream_time": "a benchmark that wants recorded HTTP calls",
}


def without(reasons: dict[str, str]) -> Callable[[SuiteT], SuiteT]:
    """Put in each test's place what pytest does not collect.

    The mark satisfies the suite's own test that none is overridden in silence.
    """

    def leave_out(suite: SuiteT) -> SuiteT:
        for name, reason in reasons.items():
            assert callable(getattr(suite, name))
            mark = pytest.mark.xfail(reason=reason).mark
            setattr(suite, name, SimpleNamespace(pytestmark=[mark]))
        return suite

    return leave_out


@pytest.fixture(autouse=True)
def at_once(provider: Provider) -> None:
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
            "stream_usage": True,  # LangChain asks only OpenAI's own address for it
            # LangChain's clients share connections, and each test has its own loop.
            "default_headers": {"connection": "close"},
        }


@without(LEFT_OUT)
class TestChatCompletions(ChatSuite):
    use_responses_api = False


@without(LEFT_OUT)
class TestResponses(ChatSuite):
    use_responses_api = True


class TestEmbeddings(EmbeddingsIntegrationTests):
    embeddings_class = OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        # Else it counts tokens by a table that it fetches.
        return {"model": "some-model", "check_embedding_ctx_length": False}
