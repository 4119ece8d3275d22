"""/docs in a real browser: Swagger UI works under the policy, loads nothing from elsewhere and sends requests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from server.api import auth
from tests.server.web.conftest import SAMPLES, Ui
from tests.support.server import full_server

KEY, LINE = auth.make("docs")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(LINE)
    with full_server(auth={"keys_file": keys}) as opened:
        yield str(opened.client.base_url).rstrip("/")


@pytest.fixture
def docs(browser: Any, url: str) -> Iterator[Ui]:
    ui = Ui(browser.new_page(), url)
    ui.page.goto(f"{url}/docs")
    ui.page.locator(".opblock").first.wait_for()
    yield ui
    ui.page.close()
    # Violations of the policy are messages on the console.
    assert not ui.errors


def try_segment(page: Any, *files: Path) -> Any:
    operation = page.locator("#operations-segment-segment_segment_post")
    operation.locator(".opblock-summary-control").click()
    operation.locator(".try-out__btn").click()
    for chooser, file in zip(operation.locator("input[type=file]").all(), files, strict=False):
        chooser.set_input_files(file)
    with page.expect_response("**/segment?*") as waited:
        operation.locator(".execute").click()
    operation.locator(".live-responses-table .response").first.wait_for()
    return waited.value


def authorize(page: Any) -> None:
    page.locator(".btn.authorize").click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("input").nth(1).fill(KEY)
    dialog.locator("button.authorize").nth(1).click()
    dialog.locator(".btn-done").first.click()


def test_try_it_out_sends_the_file_and_the_key(docs: Ui) -> None:
    authorize(docs.page)
    answer = try_segment(docs.page, SAMPLES / "cells.png")
    assert answer.status == 200, answer.text()
    assert answer.headers["content-type"] == "image/png"
    assert answer.request.headers["x-api-key"] == KEY
    curl = docs.page.locator(".curl-command").inner_text()
    assert "reference" not in curl


def test_reference_is_sent_where_one_is_chosen(docs: Ui, tmp_path: Path) -> None:
    labels = tmp_path / "labels.png"
    with Pillow.open(SAMPLES / "cells.png") as cells:
        Pillow.new("L", cells.size, 1).save(labels)
    authorize(docs.page)
    answer = try_segment(docs.page, SAMPLES / "cells.png", labels)
    assert "x-segment-iou" in answer.headers


def test_without_key_the_problem_is_shown(docs: Ui) -> None:
    answer = try_segment(docs.page, SAMPLES / "cells.png")
    assert answer.status == 401
    assert "/errors#unauthorized" in docs.page.locator(".live-responses-table").inner_text()


def test_entry_of_a_problem_is_marked(docs: Ui) -> None:
    docs.page.goto(f"{docs.url}/errors#too-large")
    assert docs.page.locator("section:target h3 code").inner_text() == "too-large"
