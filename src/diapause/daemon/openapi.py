"""The OpenAPI 3.1 document, made from the route table: it can't say what the daemon doesn't do."""

from __future__ import annotations

from typing import Any

import msgspec

from diapause import __version__, limits
from diapause.daemon.exec_wire import Control, ExecRequest, Report
from diapause.daemon.routes import NUMBER_MAX, ROUTES, ErrorAnswer, Route

_REF = "#/components/schemas/{name}"
_DESCRIPTION = (
    "One home's sandboxes and snapshots, over a unix socket. Sizes are bytes, times milliseconds. "
    "Every failure is an ErrorAnswer under the status of its class."
)


_HEADERS: list[dict[str, Any]] = [
    {
        "name": "Operation-Id", "in": "header", "required": False,
        "schema": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
        "description": "the id to know what is done by, at /v1/operations; answered always",
    },
    {
        "name": "Idempotency-Key", "in": "header", "required": False,
        "schema": {
            "type": "string", "pattern": "^[!-~]+$", "minLength": 1,
            "maxLength": limits.IDEMPOTENCY_KEY_LENGTH_MAX,
        },
        "description": "the same request under the same key is done once and answered the same",
    },
]  # fmt: skip


def document() -> dict[str, Any]:
    """The whole document."""
    types = [ErrorAnswer, ExecRequest, Control, Report]
    for route in ROUTES:
        types.extend(part for part in (route.request, route.answer) if part is not None)
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = {id(part): schema for part, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Diapause", "version": __version__, "description": _DESCRIPTION},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: Route, schema_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    failure = _REF.format(name=ErrorAnswer.__name__)
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "parameters": _parameters(route),
        "responses": {
            **_success(route, schema_of),
            "default": {
                "description": "A failure",
                "content": {"application/json": {"schema": {"$ref": failure}}},
            },
        },
    }
    if route.request is not None:
        operation["requestBody"] = {
            "required": route.body_needed,
            "content": {"application/json": {"schema": schema_of[id(route.request)]}},
        }
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if "{ref}" in route.path:
        schema = {
            "type": "string", "minLength": 1, "maxLength": limits.REFERENCE_LENGTH_MAX,
            "pattern": "^[^/]+$",
        }  # fmt: skip
        text = "an id, a unique prefix of one, or a name"
        found.append(
            {"name": "ref", "in": "path", "required": True, "schema": schema, "description": text}
        )
    if route.method != "GET" and route.handler is not None:
        found += _HEADERS
    for name, text in route.flags.items():
        schema = {"type": "boolean", "default": False}
        found.append({"name": name, "in": "query", "schema": schema, "description": text})
    for name, text in route.numbers.items():
        schema = {"type": "integer", "minimum": 0, "maximum": NUMBER_MAX}
        found.append({"name": name, "in": "query", "schema": schema, "description": text})
    return found


def _success(route: Route, schema_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    if route.stream in ("exec", "console"):
        return {"101": {"description": "The WebSocket is open"}}
    if route.stream == "logs":
        content: dict[str, Any] = {"application/octet-stream": {}}
    elif route.stream == "events":
        content = {"application/jsonl": {"schema": schema_of[id(route.answer)]}}
    elif route.stream == "metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    elif route.stream == "openapi":
        content = {"application/json": {"schema": {"type": "object"}}}
    else:
        content = {"application/json": {"schema": schema_of[id(route.answer)]}}
    return {"200": {"description": route.summary, "content": content}}
