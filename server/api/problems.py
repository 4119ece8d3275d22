"""Every error becomes application/problem+json (RFC 9457), mapped once by walking the class's ancestors."""

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

# All that a caller learns of our own faults.
INTERNAL = (
    "The server failed on this request; its log has the details under the X-Request-Id of this answer. The input was not kept."
)
JOB_INTERNAL = "The server failed on this job; its log has the details under the first eight characters of the job's id. The input was not kept."


def status_of(error: errors.UnetppError) -> HTTPStatus:
    """The status of the nearest ancestor in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def problem(
    status: HTTPStatus, code: str, detail: str, headers: dict[str, str] | None = None, fields: Mapping[str, Any] | None = None
) -> JSONResponse:
    """A response with a problem document."""
    return JSONResponse(document(status, code, detail, fields), status.value, headers, MEDIA_TYPE)


def document(status: HTTPStatus, code: str, detail: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The members of a problem document; `fields` of an error come after the standard ones."""
    standard = {"type": f"urn:unetpp:{code}", "title": status.phrase, "status": status.value, "code": code, "detail": detail}
    return {**(fields or {}), **standard}


def explain(error: Exception) -> dict[str, Any]:
    """The problem document of an error that ended a job, to be kept; details of our own faults are left out."""
    if not isinstance(error, errors.UnetppError):
        return document(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", JOB_INTERNAL)
    detail = JOB_INTERNAL if isinstance(error, errors.ServerFault) else str(error)
    # The job is over: of what a new request may try again later, nothing comes of asking for this one again.
    status = HTTPStatus.INTERNAL_SERVER_ERROR if isinstance(error, errors.TryAgain) else status_of(error)
    return document(status, error.code, detail, {} if isinstance(error, errors.ServerFault) else error.fields)


def repeat(kept: dict[str, Any], headers: dict[str, str]) -> JSONResponse:
    """Answers with a problem document that was kept."""
    return JSONResponse(kept, kept["status"], headers, MEDIA_TYPE)


def of(error: errors.UnetppError, request_id: str = "") -> JSONResponse:
    """The problem document of a domain error; details of our own faults stay in the log, under the request's id."""
    status = status_of(error)
    if isinstance(error, errors.ServerFault):
        log.error("request %s failed", request_id, exc_info=error)
        return problem(status, error.code, INTERNAL)
    retry_after_s = error.retry_after_s if isinstance(error, errors.TryAgain | errors.NotFinished) else None
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return problem(status, error.code, str(error), headers, error.fields)


def install(app: FastAPI, refuse: Callable[[str], None] = lambda reason: None) -> None:
    """Registers the handlers.

    Args:
        app: whose errors these are.
        refuse: told why something that was sent, rather than asked for, is turned away.
    """

    @app.exception_handler(errors.UnetppError)
    async def domain(request: Request, error: errors.UnetppError) -> JSONResponse:
        if error.refusal and request.method == "POST":
            refuse(error.refusal)
        return of(error, _id(request))

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return of(invalid_parameter(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        # E.g. not-found, method-not-allowed.
        named = status.phrase.lower().replace(" ", "-")
        return problem(status, named, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed unexpectedly", _id(request), exc_info=error)
        # Starlette raises the error once more after this answer, upon which uvicorn closes the connection: say so.
        headers = {"X-Request-Id": _id(request), "Connection": "close"}
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", INTERNAL, headers)


def describe(app: FastAPI) -> None:
    """Makes the OpenAPI document tell the truth about errors: FastAPI takes every model for application/json."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = plain()
        for operations in document["paths"].values():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if int(status) >= HTTPStatus.BAD_REQUEST:
                        response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        return document

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's documentation does


def _id(request: Request) -> str:
    """The id that the RequestId middleware gave."""
    return str(getattr(request.state, "request_id", ""))
