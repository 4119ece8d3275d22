"""Headers of requests: lists, and keys."""

from starlette.datastructures import Headers
from starlette.requests import Request


def header_list(request: Request, name: str) -> str | None:
    """The value of a header that is a list, which may come in several lines (RFC 9110, 5.3); None without one."""
    return ", ".join(request.headers.getlist(name)) or None


def presented_key(headers: Headers) -> str:
    """The key of a request. X-API-Key comes first, because proxies may need Authorization for themselves."""
    if key := headers.get("x-api-key"):
        return key
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
