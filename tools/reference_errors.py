"""docs/reference/errors.md: an entry per error code, with the anchors of the server's own page /errors."""

import json
import tomllib
from pathlib import Path
from typing import Any

from server import errors
from server.api.problems import ERRORS_PATH, INTERNAL
from server.api.routes.errors import HEADINGS, OPERATIONS, OPERATOR, Entry, entries
from tools.markdown import codes, page, table

EXAMPLES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("error_examples.toml").read_text()
)

INTRODUCTION = f"""\
Every error is a problem document (`application/problem+json`, RFC 9457): branch on `code`, show `detail` to people.
This page has an entry per code with cause and remedy; a running server has the same at `{ERRORS_PATH}`.

| member | content |
| --- | --- |
| `type` | address of the entry on the server that answered, as `{ERRORS_PATH}#too-large` |
| `title`, `status` | HTTP status, in words and as a number (the examples below leave out `title`) |
| `code` | kind of the error; the key of this page |
| `detail` | one or two sentences: what is wrong, the value and the limit, the remedy |
| `parameter`, `value`, `allowed` | name of the parameter, its value, values that exist |
| `limit`, `actual`, `unit`, `setting` | limit, what the input has, their unit, the setting that raises the limit |
| `remedy` | parameter, setting or route that helps |

`Retry-After` gives seconds after which the same request may succeed; after `deadline-passed` it needs more time, too. The Python client raises the class of the same
name: `except TooLarge as error: error.fields["limit"]`. A `Range` that cannot be served is answered in plain text.

"""

OPERATOR_TEXT = """\
Callers see the code, status 500 and a `detail` that names no details; the cause is in the log, under the `X-Request-Id`
of the answer. Errors without a status end the command (`unetpp serve`, `unetpp tune`), which prints them.

```json
{example}
```

"""


def error_codes() -> str:
    """The page of the error codes."""
    parts = [INTRODUCTION, _overview()]
    for section, heading in HEADINGS.items():
        parts.append(f"## {heading}\n\n" + (_operator_text() if section == OPERATOR else ""))
        parts += [_entry(entry) for entry in entries() if entry.section == section]
    return page("Error codes", *parts)


def _operator_text() -> str:
    return OPERATOR_TEXT.format(example=_document("inference-failed", 500, {"detail": INTERNAL}))


def _overview() -> str:
    by_status: dict[int, list[str]] = {}
    for entry in entries():
        if entry.status:
            by_status.setdefault(entry.status, []).append(f"[`{entry.code}`](#{entry.code})")
    rows = ((status, ", ".join(links)) for status, links in sorted(by_status.items()))
    return table(("status", "codes"), rows)


def _entry(entry: Entry) -> str:
    status = f"Status {entry.status}. " if entry.status else "Command line only. "
    members = ""
    if entry.fields:
        names = entry.fields.split(", ")
        members = f"- **Members**: {codes(names) if all(name.isidentifier() for name in names) else entry.fields}.\n"
    return (
        f"### `{entry.code}` {{ #{entry.code} }}\n\n{status}{entry.cause}\n\n"
        f"- **Remedy**: {entry.remedy}\n{members}\n{_example(entry)}"
    )


def _example(entry: Entry) -> str:
    example = EXAMPLES[entry.code]
    is_hidden = entry.section == OPERATOR and errors.all_codes().get(entry.code) not in OPERATIONS
    if is_hidden:
        where = "In the log:\n\n```text\n" if entry.status else "On the command line:\n\n```text\nerror: "
        return f"{where}{example['detail']}\n```\n\n"
    return f"```json\n{_document(entry.code, entry.status, example)}\n```\n\n"


def _document(code: str, status: int | None, example: dict[str, Any]) -> str:
    document = {"type": f"{ERRORS_PATH}#{code}", "status": status, "code": code, **example}
    lines = (f' "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in document.items())
    return "{\n" + ",\n".join(lines) + "\n}"
