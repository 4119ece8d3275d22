"""docs/reference/http.md and parameters.md: the routes by the OpenAPI documents of both ports, and their parameters."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.api.routes.job_requests import EXCLUDED, JobOptions
from server.app import create_app, create_ops_app
from server.segment.request import SegmentParams
from server.service import open_service
from server.settings import HttpSettings, Settings
from tools.markdown import codes, page, sentence, table

BUNDLES = Path(__file__).parents[1] / "bundles"

TAGS = {
    "segment": "Segment",
    "jobs": "Jobs",
    "models": "Models",
    "monai-label": "MONAI Label",
    "operate": "Health, metrics and reload",
}

INTRODUCTION = """\
Every route of the server, with its parameters, bodies, responses and headers. A running server shows the same at
`/docs`, where *Try it out* sends requests, and as OpenAPI 3.1 at `/openapi.json`.

- A server with keys answers 401 to requests without one (`Authorization: Bearer KEY` or `X-API-Key: KEY`), except on
  the [paths that need no key](../operate/security.md#paths-without-a-key).
- Every error is a problem document (`application/problem+json`); [Error codes](errors.md) has an entry per code.
- Every response has `X-Request-Id`: the caller's own where it is up to 64 letters, digits and `._-`, else a new one.
- Pages for people, which are not in the tables: `GET /` is the [web page](../guides/page.md), `GET /docs` is this API,
  `GET /errors` has the entry to which the `type` of an error leads.

"""

OPERATE = """\
With `UNETPP_HTTP__OPS_PORT` these routes are on that port alone, and `POST /reload` exists there only. Without it the
others are on the main port. `/reload` needs a key where the server has keys.

"""

BODY = """\
Body: the file itself with its `Content-Type` ({types}), or `multipart/form-data` with the fields `file` and, optionally,
`reference` (labels to score against). [Input formats](inputs.md) has what is read.

"""


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The OpenAPI documents of the main port and of the ops port."""
    settings = Settings(bundles=BUNDLES, http=HttpSettings(ops_port=9000))
    app = create_app(settings, open_service(settings))
    return app.openapi(), create_ops_app(app).openapi()


def http() -> str:
    """The page of the routes."""
    parts: dict[str, list[str]] = {tag: [] for tag in TAGS}
    for document in documents():
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                parts[operation["tags"][0]] += _operation(method, path, operation)
    sections = [
        f"## {title}\n\n{OPERATE if tag == 'operate' else ''}{''.join(parts[tag])}"
        for tag, title in TAGS.items()
    ]
    return page("HTTP API", INTRODUCTION, *sections)


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}\n\n{sentence(operation['summary'])}"
    yield f" {sentence(operation.get('description', ''))}\n\n"
    types = [name for name in operation.get("requestBody", {}).get("content", {}) if "multipart" not in name]
    if types:
        yield BODY.format(types=codes(types))
    parameters = operation.get("parameters", [])
    known = [one for one in parameters if one["in"] == "query" and one["name"] in SegmentParams.model_fields]
    if known:
        yield "Query, all optional: " + ", ".join(
            f"[`{one['name']}`](parameters.md#{one['name']})" for one in known
        )
        yield ".\n\n"
    others = [parameter for parameter in parameters if parameter not in known]
    if others:
        rows = (
            (f"`{one['name']}`", one["in"], sentence(_meaning(one)), "yes" if one.get("required") else "no")
            for one in others
        )
        yield table(("parameter", "in", "meaning", "required"), rows)
    yield from _responses(operation["responses"])


def _responses(responses: dict[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    headers: dict[str, str] = {}
    for status, response in sorted(responses.items()):
        named = {name: one["description"] for name, one in response["headers"].items()}
        retry = "; with `Retry-After`" if named.pop("Retry-After", "") else ""
        if status < "400":
            headers |= named
        text = re.sub(
            "^codes: (.*)",
            lambda found: re.sub(r"([\w-]+)", r"[`\1`](errors.md#\1)", found[1]),
            response["description"],
        )
        rows.append((status, codes(response.get("content", {})), text + retry))
    yield table(("status", "media type", "meaning"), rows)
    if len(headers) > 1:
        yield table(
            ("response header", "value"), ((f"`{name}`", sentence(text)) for name, text in headers.items())
        )


def _meaning(parameter: dict[str, Any]) -> str:
    names = {
        "id": "id of the job, from the answer to POST /jobs",
        "name": "name of the model",
        "model": "name of the model, from GET /info/",
        "session_id": "id of the session, from the answer to PUT /session/",
    }
    return str(parameter.get("description") or names[parameter["name"]])


# Inputs that a parameter is for, and further facts about it, in the order of the page.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Model, level and precision": {
        "model": ("all", ""),
        "mode": (
            "all",
            "`level` does not go with `accurate` or `auto`. `auto` needs a bundle with a curve: "
            "[Depth that chooses itself](../pruning.md#depth-that-chooses-itself).",
        ),
        "max_loss": ("all", "Does not go with `accurate` or `fast`."),
        "tta": ("all", "In every mode; [Test-time augmentation](../pruning.md#test-time-augmentation)."),
        "level": ("all", "`GET /models/NAME` has the recommended one."),
        "precision": (
            "all",
            "Others are `fp32`, `bf16`, `fp16` and `int8`, as far as `GET /models/NAME` lists them.",
        ),
    },
    "Output": {
        "format": (
            "all",
            "[Output formats](../guides/formats.md) lists the names. A name that does not fit the input gets 406.",
        ),
        "include_mask": ("all", ""),
    },
    "Input": {
        "pixel_size_um": ("images, stacks", "Refused for volumes, whose header gives the spacing."),
        "axis": (
            "volumes and stacks, with a network of images",
            "Other values are refused for images and for networks of volumes.",
        ),
        "axes": ("TIFF", "Letters T Z C Y X S. Refused for other files."),
        "channel": (
            "inputs with several channels or colours",
            "A channel that does not exist is refused with their number.",
        ),
        "series": (
            "DICOM",
            "Other inputs refuse it. Without it several series are refused, with a list of them.",
        ),
        "nonfinite": ("floating-point files", "The refusal counts the values."),
    },
    "Post-processing": {
        "threshold": (
            "all",
            "Applied in the order of this table, and reported in `X-Segment-Postprocessing`.",
        ),
        "fill_holes": ("all", ""),
        "instances": ("all", "`format=mask` then means `labels`."),
        "min_size_px": ("all", "Give one of the three minimum sizes."),
        "min_size_mm2": (
            "images; stacks whose times are one page each",
            "Give one of the three minimum sizes.",
        ),
        "min_size_mm3": ("volumes, stacks", "Give one of the three minimum sizes."),
        "min_score": ("all", ""),
        "keep_largest": ("all", ""),
    },
    "Time limits": {
        "deadline_ms": ("all", "Give the parameter or the header, once."),
        "min_level": ("all except zips", "Refused for a zip of images."),
    },
}

# Defaults that a field cannot say.
DEFAULTS = {
    "model": "[`UNETPP_DEFAULT_MODEL`](settings.md#unetpp_default_model)",
    "mode": "`accurate`; `fast` where a level is given, `auto` where max_loss is",
    "level": "with `mode=fast` the recommended one",
    "format": "by `Accept`, else `mask`",
    "pixel_size_um": "from OME or ImageJ metadata, else unknown",
    "axes": "from OME, ImageJ or tifffile metadata, else all pages are slices",
    "threshold": "that of the model card",
}

PARAMETERS = """\
`POST /segment` and `POST /jobs` take these parameters in the query. They are also the options of `unetpp segment`
(`--min-size-px` for `min_size_px`) and the keyword arguments of the [Python client](../guides/python.md).

An unknown parameter, a wrong value, and a parameter that is given twice are refused with
[`invalid-parameter`](errors.md#invalid-parameter) before the body is read; one that does not fit the input as soon as
the input's header is known.

"""

# Inputs and further text of the parameters that only jobs have.
JOB_ROWS = {
    "preview": ("all except zips", "Makes no difference at level 1."),
    "source": (
        "DICOM that a PACS has",
        "The [PACS](../operate/pacs.md) must be named in the server's configuration.",
    ),
    "store": ("DICOM that a PACS has", "An answer that is there already is not stored again."),
}

REFUSED = """\
## Routes

`POST /segment` takes all parameters above. `POST /jobs` refuses {excluded}, also as the header
`X-Deadline-Ms`, because a job is never degraded and takes the time it needs. It has parameters of its own:

"""


def parameters() -> str:
    """The page of the request parameters."""
    fields = SegmentParams.model_json_schema()["properties"]
    parts = []
    for title, rows in GROUPS.items():
        cells = (_parameter(name, fields[name], inputs, more) for name, (inputs, more) in rows.items())
        parts.append(
            f"## {title}\n\n" + table(("parameter", "values", "default", "inputs", "meaning"), cells)
        )
    jobs = JobOptions.model_json_schema()["properties"]
    own = (_parameter(name, field, *JOB_ROWS[name]) for name, field in jobs.items())
    refused = REFUSED.format(excluded=" and ".join(f"`{name}`" for name in EXCLUDED))
    own_table = table(("parameter", "values", "default", "inputs", "meaning"), own)
    return page("Request parameters", PARAMETERS, *parts, refused, own_table)


def _parameter(name: str, schema: dict[str, Any], inputs: str, more: str) -> tuple[str, ...]:
    default = schema["default"]
    text = (
        "none"
        if default in (None, "")
        else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    )
    # Without a capital, because some begin with a value.
    meaning = f"{schema['description']}. {more}"
    return (
        f'<a id="{name}"></a>`{name}`',
        _values(schema),
        DEFAULTS.get(name, text),
        inputs,
        meaning,
    )


def _values(schema: dict[str, Any]) -> str:
    """The values of a parameter: those of its enumeration, or its type with limits."""
    kind = next(kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null")
    if "enum" in kind:
        return codes(kind["enum"])
    if kind["type"] == "boolean":
        return "`true`, `false`"
    if kind["type"] == "string":
        return f"text, up to {kind['maxLength']} characters"
    low, above, high = (kind.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    limits = [f"above {above:g}"] if above is not None else []
    limits += [f"from {low:g}"] if low is not None else []
    limits += [f"to {high:g}"] if high is not None else []
    return f"{kind['type']} {' '.join(limits)}"
