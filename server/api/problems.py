"""Every error becomes application/problem+json (RFC 9457), by the nearest ancestor in one table."""

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server import errors
from server.segment.request import invalid_parameter

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

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
    errors.DeadlineTooShort: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UnknownModel: HTTPStatus.NOT_FOUND,
    errors.UnknownJob: HTTPStatus.NOT_FOUND,
    errors.NotFinished: HTTPStatus.CONFLICT,
    errors.ReloadFailed: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.CallerError: HTTPStatus.BAD_REQUEST,
    errors.ReloadRunning: HTTPStatus.CONFLICT,
    errors.Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    errors.DeadlinePassed: HTTPStatus.GATEWAY_TIMEOUT,
    errors.NotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StoreFull: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.TryAgain: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.UnetppError: HTTPStatus.INTERNAL_SERVER_ERROR,
}

# All that a caller learns of a fault of the server.
INTERNAL = "The server failed on this request; its log has the details under the X-Request-Id of this answer. The input was not kept."
JOB_INTERNAL = (
    "The server failed on this job; its log has the details under the first eight characters of the job's id. The input was "
    "not kept."
)


def status_of(error: errors.UnetppError) -> HTTPStatus:
    """The status of the nearest ancestor in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def document(
    status: HTTPStatus, code: str, detail: str, fields: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The members of a problem document: the standard ones, and fields, which cannot replace them."""
    standard = {
        "type": f"urn:unetpp:{code}",
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
) -> JSONResponse:
    """Makes a response with a problem document."""
    return JSONResponse(document(status, code, detail, fields), status.value, headers, MEDIA_TYPE)


def response_of(error: errors.UnetppError, request_id: str = "") -> JSONResponse:
    """Makes the response to a domain error.

    Details of a fault of the server go to the log, under the request's id.
    """
    status = status_of(error)
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
        return document(status_of(error), error.code, JOB_INTERNAL)
    # The job is over: even where a new request may succeed later, asking for this one again does not help.
    status = HTTPStatus.INTERNAL_SERVER_ERROR if isinstance(error, errors.TryAgain) else status_of(error)
    return document(status, error.code, str(error), error.fields)


def replay(kept: dict[str, Any], headers: dict[str, str]) -> JSONResponse:
    """Makes a response with a problem document that was kept."""
    return JSONResponse(kept, kept["status"], headers, MEDIA_TYPE)


def install(app: FastAPI, count_refusal: Callable[[str], None] = lambda reason: None) -> None:
    """Registers the handlers.

    Args:
        app: application whose errors they handle.
        count_refusal: callback with the label of each request to do work that is refused.
    """

    @app.exception_handler(errors.UnetppError)
    async def handle_domain(request: Request, error: errors.UnetppError) -> JSONResponse:
        if error.refusal and request.method == "POST":
            count_refusal(error.refusal)
        return response_of(error, _request_id(request))

    @app.exception_handler(RequestValidationError)
    async def handle_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return response_of(invalid_parameter(error.errors()))

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        headers = dict(error.headers or {})
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = _allowed_methods(request) or headers.get("Allow", "")
        # E.g. not-found, method-not-allowed.
        code = status.phrase.lower().replace(" ", "-")
        return respond(status, code, str(error.detail), headers)

    @app.exception_handler(Exception)
    async def handle_unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed unexpectedly", _request_id(request), exc_info=error)
        # Starlette raises the error once more after this response, upon which uvicorn closes the connection.
        headers = {"X-Request-Id": _request_id(request), "Connection": "close"}
        return respond(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", INTERNAL, headers)


def describe(app: FastAPI) -> None:
    """Corrects the media type of errors in the OpenAPI document, which FastAPI takes for application/json."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = generate()
        for operations in schema["paths"].values():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if int(status) >= HTTPStatus.BAD_REQUEST:
                        response["content"] = {
                            MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}
                        }
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does


def _allowed_methods(request: Request) -> str:
    """All methods of a path, of which Starlette names those of its first route alone; "" of a path without documentation."""
    path = getattr(request.scope.get("route"), "path", "")
    methods = {method.upper() for method in request.app.openapi()["paths"].get(path, {})}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _request_id(request: Request) -> str:
    """The id that the RequestId middleware set."""
    return str(getattr(request.state, "request_id", ""))
