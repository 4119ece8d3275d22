def test_first_light(client, ihc):
    import io
    from PIL import Image
    from tests.conftest import png_bytes

    r = client.post("/segment?mode=fast&level=1", content=png_bytes(ihc), headers={"content-type": "image/png"})
    assert r.status_code == 200, r.text
    assert Image.open(io.BytesIO(r.content)).size == (512, 512)


def test_tiny(tiny_bundle):
    from export.verify import verify
    from server.runtime.bundle import read_bundle

    verify(read_bundle(tiny_bundle))
