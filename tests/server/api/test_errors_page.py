"""/errors, and the address of its entries in every problem document."""

import ast
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import errors
from server.api import auth
from server.api.routes.errors import BASES, HTTP_ENTRIES, entries
from tests.conftest import ROOT
from tests.server.api.conftest import InProcess
from tests.support.files import GOOD
from tests.support.server import full_server
from tests.support.service import fake_app


def anchors(page: str) -> list[str]:
    return re.findall(r'<section id="([\w-]+)">', page)


def test_every_class_has_a_cause_and_a_remedy() -> None:
    codes = {code for code, kind in errors.all_codes().items() if kind not in BASES}
    assert {entry.code for entry in entries()} == codes | {entry.code for entry in HTTP_ENTRIES}
    assert [entry.code for entry in entries() if not (entry.cause and entry.remedy)] == []
    # A label that is misspelt would end up in the text.
    assert [entry.code for entry in entries() if re.search(r"\w:$|Fields|Remedy", entry.cause)] == []


def test_page_has_an_anchor_per_code_and_needs_no_key(small: httpx.Client) -> None:
    answer = small.get("/errors")
    assert answer.status_code == 200
    assert sorted(anchors(answer.text)) == sorted(entry.code for entry in entries())


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nothing", "not-found"),
        ("GET", "/segment", "method-not-allowed"),
        ("GET", "/models/x", "unknown-model"),
        ("POST", "/segment?mode=x", "invalid-parameter"),
        ("POST", "/segment?x=1", "invalid-parameter"),
    ],
)
def test_type_leads_to_the_entry(small: httpx.Client, method: str, path: str, code: str) -> None:
    answer = small.request(method, path)
    address = httpx.URL(str(answer.url)).join(answer.json()["type"])
    assert address.fragment == code
    assert code in anchors(small.get(address).text)


def test_ops_port_has_the_page_for_its_own_problems() -> None:
    with full_server(http={"ops_port": 1}) as opened:
        answer = opened.ops.get("/nothing")
        assert answer.json()["type"] == "/errors#not-found"
        assert "not-found" in anchors(opened.ops.get("/errors").text)


def test_page_needs_no_key_on_either_port(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(auth.make("x")[1])
    with full_server(http={"ops_port": 1}, auth={"keys_file": tmp_path / "keys"}) as opened:
        assert opened.client.get("/errors").status_code == opened.ops.get("/errors").status_code == 200


async def test_type_is_below_the_root_path(in_process: InProcess) -> None:
    """A proxy that removes a prefix makes it the root path."""
    app = fake_app()

    async def with_root(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"root_path": "/unetpp"}, receive, send)

    async with in_process(with_root) as client:
        answer = await client.post("/segment?mode=x", content=GOOD)
    assert answer.json()["type"] == "/unetpp/errors#invalid-parameter"
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_openapi_names_headers_and_no_document_that_is_never_sent(small: httpx.Client) -> None:
    document = small.get("/openapi.json").json()
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
    assert "HTTPValidationError" not in str(document)
    sent = small.post("/segment", content=GOOD).headers
    named = document["paths"]["/segment"]["post"]["responses"]["200"]["headers"]
    ours = {name for name in sent if name.startswith("x-") or name == "server-timing"}
    assert ours - {name.lower() for name in named} == set()
    assert "Retry-After" in document["paths"]["/segment"]["post"]["responses"]["429"]["headers"]


def test_subclass_elsewhere_has_the_code_of_a_class_with_an_entry() -> None:
    """A code without an entry would lead nowhere."""
    kinds, queue = [], [errors.UnetppError]
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        kinds += [kind] if kind.__module__.startswith("server.") else []
    assert len(kinds) > len(errors.all_codes())
    assert {kind.code for kind in kinds} <= set(errors.all_codes())


def raised() -> dict[str, set[str]]:
    """The fields with which the server's code makes errors, by class name; those of `**fields` are not seen."""
    made: dict[str, set[str]] = {}
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                made.setdefault(name, set()).update(keyword.arg or "" for keyword in node.keywords)
    return made


def test_fields_of_an_entry_are_those_that_the_code_gives() -> None:
    made, missing = raised(), {}
    for kind in errors.all_codes().values():
        given = made.get(kind.__name__, set()) - {"", "retry_after_s", "refusal"}
        listed = {name for entry in entries() if entry.code == kind.code for name in entry.fields.split(", ")}
        if kind is not errors.ReloadFailed and given - listed:
            missing[kind.__name__] = sorted(given - listed)
    assert missing == {}
