"""Results of a shared store over HTTP: what a client gets does not depend on where the file is."""

from tests.server.jobs.conftest import Fleet
from tests.support.files import GOOD
from tests.support.server import serving
from tests.support.service import fake_app


def test_result_is_served_whole_in_parts_and_compressed(any_store: Fleet) -> None:
    app = fake_app(jobs=any_store.settings().model_dump(exclude_unset=True))
    with serving(app) as client:
        right = client.post("/segment?format=mask.png", content=GOOD).content
        jobs = {}
        for name in ("mask.png", "mask.tiff", "json"):
            id_ = client.post(f"/jobs?format={name}", content=GOOD).json()["id"]
            assert "event: done" in client.get(f"/jobs/{id_}/events").text
            jobs[name] = f"/jobs/{id_}/result"
        whole = client.get(jobs["mask.png"])
        assert whole.content == right
        tag = whole.headers["etag"]
        head = client.head(jobs["mask.png"])
        assert (head.headers["content-length"], head.headers["etag"]) == (f"{len(right)}", tag)
        part = client.get(jobs["mask.png"], headers={"Range": "bytes=3-7", "If-Range": tag})
        assert (part.status_code, part.content) == (206, right[3:8])
        beyond = client.get(jobs["mask.png"], headers={"Range": "bytes=999999-"})
        assert beyond.status_code == 416
        plain = client.get(jobs["json"], headers={"Accept-Encoding": "identity"})
        packed = client.get(jobs["json"], headers={"Accept-Encoding": "gzip"})
        assert packed.content == plain.content
        assert client.delete(jobs["mask.png"].removesuffix("/result")).status_code == 204
        assert client.get(jobs["mask.png"]).status_code == 404
