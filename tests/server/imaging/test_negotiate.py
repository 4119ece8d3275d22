"""The header Accept, as RFC 9110 has it and as programs write it."""

import contextlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from server.arrays import InputHeader
from server.errors import UnknownFormat
from server.imaging.encode import ENCODERS, choose
from tests.server.imaging.conftest import deterministic

HEADERS = {
    "image": InputHeader((2, 3)),
    "stack": InputHeader((2, 3, 4)),
    "volume": InputHeader((2, 3, 4), affine=np.eye(4)),
}
DEFAULTS = {"image": "mask.png", "stack": "mask.tiff", "volume": "mask.nii.gz"}
BY_NAME = {"overlay", "overlay.jpg", "picture"}

# What programs send without being told to.
CLIENTS = {
    "java.net.HttpURLConnection": "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
    "java.net.HttpURLConnection 21": "*/*; q=0.2, text/html, image/gif, image/jpeg",
    "curl, requests, httpx, Go, undici": "*/*",
    "Chrome, page": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,"
    "application/signed-exchange;v=b3;q=0.7",
    "Chrome, picture": "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8",
    "Firefox, picture": "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5",
    "Safari, picture": "image/webp,image/avif,image/jxl,image/heic,video/*;q=0.8,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5",
    "Internet Explorer": "image/jpeg, application/x-ms-application, image/gif, application/xaml+xml, image/pjpeg, */*",
    "Opera 12": "text/html, application/xml;q=0.9, image/jpeg, image/gif, image/x-xbitmap, */*;q=0.1",
    "wget": "*/*",
    "empty": "",
    "commas": ", ,",
}


@pytest.mark.parametrize("accept", CLIENTS.values(), ids=CLIENTS)
@pytest.mark.parametrize("kind", HEADERS)
def test_default_header_of_a_program_gives_the_mask(kind: str, accept: str) -> None:
    assert choose(None, accept, HEADERS[kind]) == (DEFAULTS[kind],)


# Rows of an image, and headers that choose them.
ROWS = {
    "a weight without a digit before the point": ("mask.png", "image/tiff;q=.2, image/png;q=.9"),
    "a weight without a digit behind the point": ("mask.tiff", "image/tiff;q=1., image/png;q=0."),
    "more digits than RFC 9110 allows": ("mask.tiff", "image/png;q=0.33333, image/tiff;q=0.33334"),
    "Q": ("mask.tiff", "image/png;Q=0.5, image/tiff;Q=0.6"),
    "space": ("mask.tiff", "image/png ; q = 0.5 ,image/tiff\t; q=0.6"),
    "a weight in quotes": ("mask.tiff", 'image/png;q="0.5", image/tiff;q="0.6"'),
    "a weight above 1": ("mask.png", "image/png;q=5, image/tiff;q=0.9"),
    "parameters": ("csv", "text/csv; charset=utf-8; header=present, image/png;q=0.9"),
    "a comma in quotes": ("csv", 'text/csv; a="b, image/png;q=1", image/png;q=0.9'),
    "a parameter behind the weight": ("csv", "text/csv;q=0.9;level=1, image/png;q=0.8"),
    "a range without parameters comes first": ("mask.png", "text/csv;v=1, text/csv;q=0.3, image/png;q=0.5"),
    "the closest range": ("mask.tiff", "image/*;q=0.9, image/png;q=0.1, */*;q=0.2"),
    "the closest range forbids": ("mask.tiff", "image/png;q=0, image/*"),
    "all but": ("mask.tiff", "*/*, image/png;q=0"),
    "weight before order": ("json", "image/png;q=0.4, application/json;q=0.5"),
    "named before any": ("json", "*/*, application/json"),
    "type before any": ("csv", "*/*, text/*"),
    "order": ("mask.tiff", "image/tiff, image/png"),
    "a weight that is no number": ("mask.tiff", "image/png;q=high, image/tiff;q=0.1"),
    "no slash": ("mask.tiff", "png, image/tiff"),
    "no subtype": ("mask.tiff", "image/, image/tiff;q=0.1"),
    "upper case": ("mask.tiff", "IMAGE/TIFF"),
    # RFC 9110, 12.5.1: there text/plain weighs 0.7, here text/csv stands for it.
    "RFC 9110": (
        "csv",
        "text/*;q=0.3, text/csv;q=0.7, text/csv;format=flowed, text/csv;format=fixed;q=0.4, */*;q=0.5",
    ),
}


@pytest.mark.parametrize(("row", "accept"), ROWS.values(), ids=ROWS)
def test_accept_is_read_as_rfc_9110_has_it(row: str, accept: str) -> None:
    assert choose(None, accept, HEADERS["image"]) == (row,)
    # Before the input is known, every row fits.
    assert choose(None, accept)


def test_rfc_9110_example_orders_the_types() -> None:
    accept = "image/*;q=0.3, text/csv;q=0.7, application/json;q=0.4, */*;q=0.5"
    assert choose(None, accept, HEADERS["volume"]) == ("csv",)
    assert choose(None, accept.replace("text/csv;q=0.7", "text/csv;q=0"), HEADERS["volume"]) == (
        "mask.nii.gz",
    )


@pytest.mark.parametrize("accept", ["image/jpeg", "image/jpeg;q=1, image/gif", "image/jpeg, */*;q=0"])
@pytest.mark.parametrize("kind", HEADERS)
def test_accept_never_gives_a_lossy_picture(kind: str, accept: str) -> None:
    with pytest.raises(UnknownFormat) as caught:
        choose(None, accept, HEADERS[kind])
    assert "overlay.jpg" in caught.value.fields["allowed"]


def test_rows_by_name_only() -> None:
    assert {name for name, row in ENCODERS.items() if row.by_name_only} == BY_NAME


TYPES = sorted({row.media_type for row in ENCODERS.values()} | {"image/gif", "text/html"})
RANGES = [*TYPES, "*/*", "image/*", "application/*", "text/*"]
WEIGHTS = ["", ";q=0", ";q=0.2", ";q=0.25", "; q=0.9", ";q=1.0", ";q=1"]
entries = strategies.tuples(strategies.sampled_from(RANGES), strategies.sampled_from(WEIGHTS))


@deterministic
@hypothesis.given(
    accepted=strategies.lists(entries, min_size=1, max_size=6, unique_by=lambda entry: entry[0]),
    kind=strategies.sampled_from(sorted(HEADERS)),
)
def test_no_other_format_has_a_greater_weight(accepted: list[tuple[str, str]], kind: str) -> None:
    """Werkzeug weighs the types."""
    datastructures = pytest.importorskip("werkzeug.datastructures")
    http = pytest.importorskip("werkzeug.http")
    accept = ", ".join(media_type + weight for media_type, weight in accepted)
    weigh = http.parse_accept_header(accept, datastructures.MIMEAccept).quality
    fitting = [row for name, row in ENCODERS.items() if kind in row.kinds and name not in BY_NAME]
    best = max(weigh(row.media_type) for row in fitting)
    chosen: tuple[str, ...] = ()
    with contextlib.suppress(UnknownFormat):
        chosen = choose(None, accept, HEADERS[kind])
    if best > 0:
        assert weigh(ENCODERS[chosen[0]].media_type) == best
    else:
        assert chosen in ((), (DEFAULTS[kind],))
