import asyncio
from itertools import islice
from typing import Any
from unittest import mock

import openai
import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer
from openai import DefaultHttpxClient, OpenAI
from openai.types import FileDeleted, FileObject

from helpers.connection import Provider
from llm_stub import files, server
from tests.llm_stub.conftest import Json, assert_matches_exactly, upload


@pytest.fixture
def post(provider: Provider, connections: DefaultHttpxClient) -> Any:
    """Send a form that no SDK would send; returns the status and the error."""

    def post(**options: Any) -> tuple[int, Json]:
        response = connections.post(f"{provider.url}/v1/files", **options)
        return response.status_code, response.json()["error"]

    return post


# Upload, read, delete


@pytest.mark.parametrize(
    "content",
    [b"", bytes(range(256)) * 999, b"\r\n--\r\n\r\n--", "日本語\n".encode()],
    ids=["empty", "all bytes", "form boundary", "text"],
)
def test_file_content_is_returned_unchanged(client: OpenAI, content: bytes) -> None:
    file = client.files.create(file=("ünï.bin", content), purpose="user_data")
    assert (file.filename, file.bytes) == ("ünï.bin", len(content))
    assert client.files.content(file.id).content == content
    assert client.files.retrieve(file.id) == file


def test_upload_can_say_when_the_file_expires(client: OpenAI) -> None:
    file = client.files.create(
        file=b"1",
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600


def test_file_object_matches_the_sdks_type_exactly(client: OpenAI) -> None:
    raw = client.files.with_raw_response
    assert_matches_exactly(FileObject, raw.create(file=b"some", purpose="batch"))
    file = upload(client, b"some")
    assert_matches_exactly(FileObject, raw.retrieve(file.id))
    assert_matches_exactly(FileDeleted, raw.delete(file.id))


def test_deleted_file_is_not_found(client: OpenAI) -> None:
    file, other = upload(client, b"1"), upload(client, b"2")
    assert client.files.delete(file.id).deleted
    for method in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            method(file.id)
    assert file.id not in [listed.id for listed in client.files.list()]
    assert client.files.retrieve(other.id) == other


# Lists


def test_files_are_listed_in_pages_newest_first(client: OpenAI) -> None:
    uploaded = [upload(client, b"1", "vision") for _ in range(5)]
    upload(client, b"1", "assistants")
    page = client.files.list(purpose="vision", limit=2)
    assert page.data == [uploaded[4], uploaded[3]]
    assert page.has_next_page()
    assert list(islice(page, 5)) == uploaded[::-1]
    after = client.files.list(purpose="vision", after=uploaded[3].id, limit=3)
    assert after.data == uploaded[2::-1]


def test_files_are_listed_oldest_first_on_request(client: OpenAI) -> None:
    uploaded = [upload(client, b"1", "vision") for _ in range(5)]
    listed = list(client.files.list(purpose="vision", order="asc", limit=2))
    assert listed[-5:] == uploaded


def test_list_without_a_purpose_has_all_files(client: OpenAI) -> None:
    uploaded = [upload(client, b"1", purpose) for purpose in ("batch", "fine-tune")]
    assert client.files.list().data[:2] == uploaded[::-1]


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
@pytest.mark.parametrize("kind", ["files", "batches"])
def test_invalid_limit_of_a_list_gets_a_400(
    client: OpenAI, kind: str, limit: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        getattr(client, kind).list(extra_query={"limit": limit})
    assert error.value.param == "limit"


# Invalid forms


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": (None, "batch")}, "file"),
        ({"file": ("a", b"1")}, "purpose"),
        ({"file": ("a", b"1"), "purpose": (None, "")}, "purpose"),
        ({"file": ("a", b"1"), "purpose": (None, "fun")}, "purpose"),
        ({"file": ("a", b"1"), "purpose": (None, "batch_output")}, "purpose"),
    ],
    ids=["no file", "no purpose", "empty purpose", "unknown purpose", "stub's own"],
)
def test_form_without_a_file_or_a_valid_purpose_gets_a_400(
    post: Any, form: Json, param: str
) -> None:
    status, error = post(files=form)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"colour": "blue"}, "colour"),
        ({"expires_after": "tomorrow"}, "expires_after"),
        ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"},
            "expires_after.seconds",
        ),
    ],
)
def test_unknown_or_invalid_field_of_a_form_gets_a_400(
    post: Any, fields: dict[str, str], param: str
) -> None:
    status, error = post(files={"file": b"1"}, data={"purpose": "batch"} | fields)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param


@pytest.mark.parametrize("sent", [{"json": {}}, {"data": {"purpose": "batch"}}, {}])
def test_body_that_is_not_a_multipart_form_gets_a_400(post: Any, sent: Json) -> None:
    status, error = post(**sent)
    assert status == 400
    assert "multipart/form-data" in error["message"]


FILE_PART = b'--B\r\nContent-Disposition: form-data; name="file"'


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"no form",
        FILE_PART,
        FILE_PART + b"\r\n\r\nnever ends",
        FILE_PART.replace(b":", b"") + b"\r\n\r\n1\r\n--B--\r\n",
        FILE_PART + b"\r\nx: " + b"x" * 99_999 + b"\r\n\r\n1\r\n--B--\r\n",
        FILE_PART.replace(b"file", b"purpose")
        + b"\r\nContent-Transfer-Encoding: none\r\n\r\nbatch\r\n--B--\r\n",
    ],
    ids=[
        "empty",
        "text",
        "truncated header",
        "no end",
        "malformed header",
        "long header",
        "unknown encoding",
    ],
)
def test_malformed_form_gets_a_400(post: Any, form: bytes) -> None:
    content_type = "multipart/form-data; boundary=B"
    status, error = post(content=form, headers={"content-type": content_type})
    assert (status, error["type"]) == (400, "invalid_request_error")


# Size limits


def test_file_can_be_larger_than_the_body_of_a_call(client: OpenAI) -> None:
    file = upload(client, bytes(server.MAX_BODY_BYTES + 1), "user_data")
    assert client.files.retrieve(file.id).bytes == server.MAX_BODY_BYTES + 1
    client.files.delete(file.id)


@pytest.mark.parametrize(
    ("limit", "max_bytes"), [("MAX_FILE_BYTES", 10), ("MAX_TOTAL_BYTES", 20)]
)
def test_file_over_a_size_limit_gets_a_413_and_is_not_stored(
    limit: str, max_bytes: int
) -> None:
    async def upload_10_and_11_bytes() -> tuple[list[int], int]:
        async with TestClient(TestServer(server.Server().app())) as http:
            statuses = []
            for size in (10, 11):
                form = FormData({"purpose": "batch"})
                form.add_field("file", bytes(size), filename="a")
                response = await http.post("/v1/files", data=form)
                statuses.append(response.status)
            listed = await (await http.get("/v1/files")).json()
            return statuses, len(listed["data"])

    with mock.patch.object(files, limit, max_bytes):
        assert asyncio.run(upload_10_and_11_bytes()) == ([200, 413], 1)
