"""GET /docs: what /openapi.json says, for people. It loads nothing from elsewhere, as the page."""

import functools
import hashlib
import re
from base64 import b64encode
from collections.abc import Callable
from html import escape
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

METHODS = ("get", "post", "put", "patch", "delete")

STYLE = """
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 60rem; margin: 0 auto; padding: 1rem }
  code { overflow-wrap: anywhere }
  table { border-collapse: collapse } td { padding: .15rem .75rem .15rem 0; vertical-align: top }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}</style></head>
<body>
<h1>{title} {version}</h1>
<p>{summary} For programs: <a href="/openapi.json">/openapi.json</a>.</p>
{routes}
</body>
</html>
"""


def policy(page: str) -> dict[str, str]:
    """Headers that let the page use its own inline style, and nothing else."""
    texts = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    styles = " ".join(f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
    rules = ("default-src 'none'", f"style-src {styles}", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'")
    return {"Content-Security-Policy": "; ".join(rules)}


def router(openapi: Callable[[], dict[str, Any]]) -> APIRouter:
    """The route over what describes the application."""
    routes = APIRouter()

    @functools.cache
    def described() -> tuple[str, dict[str, str]]:
        # When it is first asked for: now not all routes are there. Nobody needs a key for it, so it is made once.
        text = render(openapi())
        return text, policy(text)

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        text, headers = described()
        return HTMLResponse(text, headers=headers)

    return routes


def render(document: dict[str, Any]) -> str:
    """An OpenAPI document as a page."""
    listed = [
        _route(method, path, item[method]) for path, item in document["paths"].items() for method in METHODS if method in item
    ]
    info = document["info"]
    return TEMPLATE.format(
        title=escape(info["title"]), version=escape(info["version"]), summary=escape(info.get("summary", "")),
        style=STYLE, routes="\n".join(listed),
    )  # fmt: skip


def _route(method: str, path: str, route: dict[str, Any]) -> str:
    needs = "<p>Needs an API key: <code>Authorization: Bearer KEY</code> or <code>X-API-Key: KEY</code>.</p>" * (
        "security" in route
    )
    bodies = ", ".join(f"<code>{escape(kind)}</code>" for kind in route.get("requestBody", {}).get("content", {}))
    parameters = _table(
        (
            f"<code>{escape(one['name'])}</code>",
            escape(one["in"]) + ", needed" * one.get("required", False),
            f"{_kind(one.get('schema', {}))} {escape(one.get('description', ''))}",
        )
        for one in route.get("parameters", [])
    )
    answers = _table(
        (
            code,
            " ".join(f"<code>{escape(kind)}</code>" for kind in answer.get("content", {})),
            escape(answer.get("description", "")),
        )
        for code, answer in route["responses"].items()
    )
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>\n<p>{escape(route.get('summary', ''))}</p>\n"
        f"<p>{escape(route.get('description', ''))}</p>\n{needs}\n"
        + (f"<p>Body: {bodies}</p>\n" if bodies else "")
        + (f"<h3>Parameters</h3>\n{parameters}\n" if parameters else "")
        + f"<h3>Answers</h3>\n{answers}"
    )


def _table(rows: Any) -> str:
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n{body}\n</table>" if body else ""


def _kind(schema: dict[str, Any]) -> str:
    """What a parameter may be, in few words."""
    kinds = schema.get("anyOf", [schema])
    said = [" | ".join(map(str, kind["enum"])) if "enum" in kind else kind.get("type", "") for kind in kinds]
    default = f" = {schema['default']}" if schema.get("default") is not None else ""
    return f"<code>{escape(' | '.join(one for one in said if one != 'null') + default)}</code>"
