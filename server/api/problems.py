"""Every error becomes application/problem+json (RFC 9457), by the nearest ancestor in one table."""

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from server import errors
from server.segment.request import invalid_parameter

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

# The page of the server with an entry per code. A relative reference (RFC 9457, section 3.1.1), because a
# server without internet access must be able to show it.
ERRORS_PATH = "/errors"

# The Open Inference Protocol has errors of its own form.
OPEN_INFERENCE_PATH = "/v2"

STATUS: dict[type[errors.UnetppError], HTTPStatus] = {
    errors.Unreadable: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UnsupportedType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.HeadTooLarge: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.UploadStalled: HTTPStatus.REQUEST_TIMEOUT,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.OtherSite: HTTPStatus.FORBIDDEN,
    errors.UnknownFormat: HTTPStatus.NOT_ACCEPTABLE,
    errors.InvalidParameter: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.InvalidInferRequest: HTTPStatus.BAD_REQUEST,
    errors.DeadlineTooShort: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UnknownModel: HTTPStatus.NOT_FOUND,
    errors.UnknownJob: HTTPStatus.NOT_FOUND,
    errors.UnknownUpload: HTTPStatus.NOT_FOUND,
    errors.Unimplemented: HTTPStatus.NOT_IMPLEMENTED,
    errors.NotFinished: HTTPStatus.CONFLICT,
    errors.PacsRefused: HTTPStatus.BAD_GATEWAY,
    errors.ReloadFailed: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.CallerError: HTTPStatus.BAD_REQUEST,
    errors.ReloadRunning: HTTPStatus.CONFLICT,
    errors.Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    errors.DeadlinePassed: HTTPStatus.GATEWAY_TIMEOUT,
    errors.NotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StoreFull: HTTPStatus.INSUFFICIENT_STORAGE,
    # Of a job that is over.
    errors.Interrupted: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.TryAgain: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.UnetppError: HTTPStatus.INTERNAL_SERVER_ERROR,
}

# Errors of single routes, of the command line, and base classes.
NOT_USUAL = {
    errors.UnetppError,
    errors.CallerError,
    errors.TryAgain,
    errors.ServerFault,
    errors.UnknownJob,
    errors.UnknownUpload,
    errors.InvalidInferRequest,
    errors.Unimplemented,
    errors.NotFinished,
    errors.PacsRefused,
    errors.PacsUnavailable,
    errors.StoreUnavailable,
    errors.Interrupted,
    errors.ReloadFailed,
    errors.ReloadRunning,
    errors.Misconfigured,
    errors.TuningTooNoisy,
}

# Statuses of errors that say when to try again.
RETRY_STATUSES = {409, 429, 503, 504, 507}

# Codes of errors that HTTP itself knows; not made of the phrases of the standard library, which change with its versions.
HTTP_CODES = {
    HTTPStatus.BAD_REQUEST: "bad-request",
    HTTPStatus.NOT_FOUND: "not-found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method-not-allowed",
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: "range-not-satisfiable",
}

# All that a caller learns of a fault of the server.
INTERNAL = "The server failed on this request; its log has the details under the X-Request-Id of this answer. The input was not kept."
JOB_INTERNAL = (
    "The server failed on this job; its log has the details under the first eight characters of the job's id. The input was "
    "not kept."
)


class ProblemResponse(JSONResponse):
    """A response with a problem document, whose `type` leads below the root path of the application.

    Args:
        document: members of the problem document.
        headers: further headers.
    """

    media_type = MEDIA_TYPE

    def __init__(self, document: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(document, document["status"], headers)
        self._document = document

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry. Clients of the Open Inference Protocol get the form of errors that it prescribes."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if path == OPEN_INFERENCE_PATH or path.startswith(f"{OPEN_INFERENCE_PATH}/"):
            self.body = self.render({"error": self._document["detail"]})
            self.headers["Content-Length"] = f"{len(self.body)}"
            self.headers["Content-Type"] = "application/json"
        elif root := scope.get("root_path"):
            self.body = self.render({**self._document, "type": f"{root}{self._document['type']}"})
            self.headers["Content-Length"] = f"{len(self.body)}"
        await super().__call__(scope, receive, send)


def status_of(kind: type[errors.UnetppError]) -> HTTPStatus:
    """The status of the nearest ancestor of a class in the table."""
    return next(STATUS[cls] for cls in kind.__mro__ if cls in STATUS)


def document(
    status: HTTPStatus, code: str, detail: str, fields: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The members of a problem document: the standard ones, and fields, which cannot replace them."""
    standard = {
        "type": f"{ERRORS_PATH}#{code}",
        "title": status.phrase,
        "status": status.value,
        "code": code,
        "detail": detail,
    }
    return {**(fields or {}), **standard}


def respond(
    status: HTTPStatus,
    code: str,
    detail: str,
    headers: dict[str, str] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> ProblemResponse:
    """Makes a response with a problem document."""
    return ProblemResponse(document(status, code, detail, fields), headers)


def response_of(error: errors.UnetppError, request_id: str = "") -> ProblemResponse:
    """Makes the response to a domain error.

    Details of a fault of the server go to the log, under the request's id.
    """
    status = status_of(type(error))
    if isinstance(error, errors.ServerFault):
        log.error("request %s failed", request_id, exc_info=error)
        return respond(status, error.code, INTERNAL)
    retry_after_s = error.retry_after_s if isinstance(error, errors.TryAgain | errors.NotFinished) else None
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return respond(status, error.code, str(error), headers, error.fields)


def job_document_of(error: Exception) -> dict[str, Any]:
    """The problem document of an error that ended a job, without details of a fault of the server."""
    if not isinstance(error, errors.UnetppError):
        return document(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", JOB_INTERNAL)
    if isinstance(error, errors.ServerFault):
        return document(status_of(type(error)), error.code, JOB_INTERNAL)
    # The job is over: even where a new request may succeed later, asking for this one again does not help.
    status = (
        HTTPStatus.INTERNAL_SERVER_ERROR if isinstance(error, errors.TryAgain) else status_of(type(error))
    )
    return document(status, error.code, str(error), error.fields)


def replay(kept: dict[str, Any], headers: dict[str, str]) -> ProblemResponse:
    """Makes a response with a problem document that was kept."""
    return ProblemResponse(kept, headers)


async def _handle_full_disk(request: Request, error: Exception) -> ProblemResponse:
    if (full := errors.disk_full(error)) is None:
        raise error
    log.error("request %s failed: %s", _request_id(request), error)
    return response_of(full)


def install(app: FastAPI, count_refusal: Callable[[str], None] = lambda reason: None) -> None:
    """Registers the handlers.

    Args:
        app: application whose errors they handle.
        count_refusal: callback with the label of each request to do work that is refused.
    """

    @app.exception_handler(errors.UnetppError)
    async def handle_domain(request: Request, error: errors.UnetppError) -> ProblemResponse:
        if error.refusal and request.method in ("POST", "PUT"):
            count_refusal(error.refusal)
        return response_of(error, _request_id(request))

    @app.exception_handler(RequestValidationError)
    async def handle_validation(_: Request, error: RequestValidationError) -> ProblemResponse:
        return response_of(invalid_parameter(error.errors()))

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> ProblemResponse:
        status = HTTPStatus(error.status_code)
        headers = dict(error.headers or {})
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = _allowed_methods(request) or headers.get("Allow", "")
        code = HTTP_CODES.get(
            status, "bad-request" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal"
        )
        return respond(status, code, str(error.detail), headers)

    app.add_exception_handler(OSError, _handle_full_disk)

    @app.exception_handler(Exception)
    async def handle_unexpected(request: Request, error: Exception) -> ProblemResponse:
        log.error("request %s failed unexpectedly", _request_id(request), exc_info=error)
        # Starlette raises the error once more after this response, upon which uvicorn closes the connection.
        headers = {"X-Request-Id": _request_id(request), "Connection": "close"}
        return respond(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", INTERNAL, headers)


def describe(app: FastAPI) -> None:
    """Corrects the OpenAPI document: errors, which FastAPI takes for application/json, and headers of all responses."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = generate()
        for operations in schema["paths"].values():
            for operation in operations.values():
                # FastAPI adds it to every route with a parameter, also where none can be wrong.
                if operation["responses"].get("422", {}).get("description") == "Validation Error":
                    del operation["responses"]["422"]
                for status, response in operation["responses"].items():
                    _describe_response(int(status), response)
        # FastAPI's own documents of errors, which this server never sends.
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does


def describe_headers(texts: Mapping[str, str]) -> dict[str, Any]:
    """The headers of a response for the OpenAPI document, by name and description."""
    return {name: {"schema": {"type": "string"}, "description": text} for name, text in texts.items()}


def _describe_response(status: int, response: dict[str, Any]) -> None:
    headers = {"X-Request-Id": "id of the request in the log; the caller's own, or a new one"}
    if status >= HTTPStatus.BAD_REQUEST:
        response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        if response["description"] == HTTPStatus(status).phrase:
            response["description"] = f"codes: {', '.join(_codes(status))}"
    if status in RETRY_STATUSES:
        headers["Retry-After"] = "seconds after which the request may succeed"
    response.setdefault("headers", {}).update(describe_headers(headers))


def _codes(status: int) -> list[str]:
    """The codes with which a status usually comes; routes with others describe them themselves."""
    codes = [
        kind.code
        for kind in errors.all_codes().values()
        if kind not in NOT_USUAL and status_of(kind) == status
    ]
    return codes or ["internal"]


def _allowed_methods(request: Request) -> str:
    """All methods of a path, of which Starlette names those of its first route alone; "" of a path without documentation."""
    path = getattr(request.scope.get("route"), "path", "")
    methods = {method.upper() for method in request.app.openapi()["paths"].get(path, {})}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _request_id(request: Request) -> str:
    """The id that the RequestId middleware set."""
    return str(getattr(request.state, "request_id", ""))
