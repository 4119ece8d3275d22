"""Headers of requests that are lists."""

from starlette.requests import Request


def header_list(request: Request, name: str) -> str | None:
    """The value of a header that is a list, which may come in several lines (RFC 9110, 5.3); None without one."""
    return ", ".join(request.headers.getlist(name)) or None
