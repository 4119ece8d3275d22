"""GET /docs: the OpenAPI document as one HTML page, which loads nothing from another origin."""

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
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style>
</head>
<body>
<h1>{title} {version}</h1>
<p>{summary} For programs: <a href="/openapi.json">/openapi.json</a>.</p>
{routes}
</body>
</html>
"""


def policy(page: str) -> dict[str, str]:
    """Makes the headers that allow the inline style of a page, and nothing else."""
    texts = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    styles = " ".join(
        f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
    )
    rules = (
        "default-src 'none'",
        f"style-src {styles}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {"Content-Security-Policy": "; ".join(rules)}


def router(openapi: Callable[[], dict[str, Any]]) -> APIRouter:
    """Makes the route; `openapi` gives the OpenAPI document of the application."""
    routes = APIRouter()

    @functools.cache
    def page() -> tuple[str, dict[str, str]]:
        # Rendered at the first request because the application may get further routes after this one.
        text = render(openapi())
        return text, policy(text)

    @routes.head("/docs", include_in_schema=False)
    @routes.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        text, headers = page()
        return HTMLResponse(text, headers=headers)

    return routes


def render(document: dict[str, Any]) -> str:
    """Renders an OpenAPI document as HTML."""
    routes = [
        _route(method, path, item[method])
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    ]
    info = document["info"]
    return TEMPLATE.format(
        title=escape(info["title"]),
        version=escape(info["version"]),
        summary=escape(info.get("summary", "")),
        style=STYLE,
        routes="\n".join(routes),
    )


def _route(method: str, path: str, route: dict[str, Any]) -> str:
    key = "<p>Needs an API key: <code>Authorization: Bearer KEY</code> or <code>X-API-Key: KEY</code>.</p>"
    content = route.get("requestBody", {}).get("content", {})
    bodies = ", ".join(f"<code>{escape(media_type)}</code>" for media_type in content)
    parameters = _table(
        (
            f"<code>{escape(parameter['name'])}</code>",
            escape(parameter["in"]) + ", required" * parameter.get("required", False),
            f"{_type(parameter.get('schema', {}))} {escape(parameter.get('description', ''))}",
        )
        for parameter in route.get("parameters", [])
    )
    responses = _table(
        (
            code,
            " ".join(f"<code>{escape(media_type)}</code>" for media_type in response.get("content", {})),
            escape(response.get("description", "")),
        )
        for code, response in route["responses"].items()
    )
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>\n<p>{escape(route.get('summary', ''))}</p>\n"
        f"<p>{escape(route.get('description', ''))}</p>\n"
        + (f"{key}\n" if "security" in route else "")
        + (f"<p>Body: {bodies}</p>\n" if bodies else "")
        + (f"<h3>Parameters</h3>\n{parameters}\n" if parameters else "")
        + f"<h3>Responses</h3>\n{responses}"
    )


def _table(rows: Any) -> str:
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n{body}\n</table>" if body else ""


def _type(schema: dict[str, Any]) -> str:
    """Describes the type of a parameter, its values and its default."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    types = [" | ".join(map(str, kind["enum"])) if "enum" in kind else kind.get("type", "") for kind in kinds]
    default = f" = {schema['default']}" if schema.get("default") is not None else ""
    return f"<code>{escape(' | '.join(types) + default)}</code>"
