"""GET /errors: an entry for each code of a problem document, to which its `type` leads.

The page is the server's own, because a hospital's network may not reach a manual elsewhere. The texts are the
docstrings of `server/errors.py`.
"""

import functools
import hashlib
import inspect
import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from server import errors
from server.api import problems

STYLE = """
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 48rem; margin: 0 auto; padding: 1rem }
  code { overflow-wrap: anywhere }
  section { padding: .1rem .75rem; border-left: .25rem solid transparent }
  section:target { border-color: #d97706 }
"""

# Sections of the page, and of the manual, by code.
CALLER, AGAIN, OPERATOR = "caller", "again", "operator"
HEADINGS = {
    CALLER: "Errors that the caller can correct",
    AGAIN: "Errors after which the same request may succeed",
    OPERATOR: "Errors that the operator must correct",
}

BASES = (errors.UnetppError, errors.CallerError, errors.TryAgain, errors.ServerFault)

# Errors that end `unetpp serve` or `unetpp tune`, and are never the answer to a request.
COMMAND_LINE_ONLY = (errors.Misconfigured, errors.TuningTooNoisy)
OPERATIONS = (errors.ReloadFailed, errors.ReloadRunning)


@dataclass(frozen=True)
class Entry:
    """The entry of a code.

    Attributes:
        code: member `code` of the problem document.
        status: HTTP status; None where the error is never the answer to a request.
        section: key of `HEADINGS`.
        cause: sentences of the cause.
        remedy: sentences of the remedy.
        fields: further members that the document may have, as one line; "" where there are none.
    """

    code: str
    status: int | None
    section: str
    cause: str
    remedy: str
    fields: str


# Codes that come from HTTP itself, which have no class.
HTTP_ENTRIES = (
    Entry(
        "bad-request",
        400,
        CALLER,
        "The bytes are not an HTTP/1.1 request, the head is too long, or the body comes in chunks of a few bytes.",
        "Send the request with an HTTP library, with fewer headers, or with a `Content-Length`.",
        "",
    ),
    Entry(
        "not-found",
        404,
        CALLER,
        "The path does not exist.",
        "Look the path up in the manual, or in `/docs`.",
        "",
    ),
    Entry(
        "method-not-allowed",
        405,
        CALLER,
        "The path exists, but not with this method.",
        "Use one of the methods in the header `Allow`.",
        "",
    ),
    Entry(
        "range-not-satisfiable",
        416,
        CALLER,
        "The header `Range` requests bytes that lie behind the end of the file.",
        "Ask for less; the header `Content-Range` gives the size of the file.",
        "",
    ),
    Entry(
        "internal",
        500,
        OPERATOR,
        "The server failed in a way that nothing else describes. The log has the details under the `X-Request-Id` of the answer.",
        "Report the log's message and traceback to the developers.",
        "",
    ),
)


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All entries, section by section; those of HTTP itself are the last of each."""
    every = [*(_entry(kind) for kind in errors.all_codes().values() if kind not in BASES), *HTTP_ENTRIES]
    return tuple(entry for section in HEADINGS for entry in every if entry.section == section)


def _entry(kind: type[errors.UnetppError]) -> Entry:
    """The entry of a class, from its docstring: the cause, then `Remedy:`, `Fields:` and `Args:`."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\nArgs:")[0]
    cause, *labelled = re.split(r"\n(Remedy|Fields): ", text)
    parts = {label: " ".join(part.split()) for label, part in zip(labelled[::2], labelled[1::2], strict=True)}
    operator = issubclass(kind, errors.ServerFault) or kind in OPERATIONS
    return Entry(
        kind.code,
        None if kind in COMMAND_LINE_ONLY else problems.status_of(kind).value,
        OPERATOR if operator else AGAIN if issubclass(kind, errors.TryAgain) else CALLER,
        " ".join(cause.split()),
        parts.get("Remedy", ""),
        parts.get("Fields", ""),
    )


def render() -> str:
    """The page."""
    parts = []
    for section, heading in HEADINGS.items():
        parts.append(f"<h2>{heading}</h2>")
        parts += [part for entry in entries() if entry.section == section for part in _section(entry)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Error codes</title><style>{STYLE}</style>\n</head>\n<body>\n<h1>Error codes</h1>\n"
        "<p>The member <code>type</code> of an error leads here. Its <code>detail</code> has the value, the limit and the "
        "remedy of the one request.</p>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _section(entry: Entry) -> Iterator[str]:
    status = "" if entry.status is None else f" (status {entry.status})"
    yield f'<section id="{entry.code}">\n<h3><code>{entry.code}</code>{status}</h3>'
    yield f"<p>{_html(entry.cause)}</p>\n<p>Remedy: {_html(entry.remedy)}</p>"
    if entry.fields:
        yield f"<p>Members: {_html(entry.fields)}</p>"
    yield "</section>"


def _html(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def router() -> APIRouter:
    """Makes the route. The page is small and never changes, so that it is rendered once."""
    routes = APIRouter()
    digest = b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    page = render()

    @routes.head(problems.ERRORS_PATH, include_in_schema=False)
    @routes.get(problems.ERRORS_PATH, include_in_schema=False)
    async def error_codes() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return routes
