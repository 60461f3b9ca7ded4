"""The OpenAPI document says what the daemon does, no more and no less."""

from __future__ import annotations

import asyncio
import json
import tempfile
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute

from diapause.daemon.app import application
from diapause.daemon.openapi import document
from diapause.daemon.routes import ROUTES
from diapause.daemon.state import State
from diapause.store.home import Home
from tests.framework.fake_engine import FakeEngine

CHECKS = (
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


_DIRECTORY = tempfile.TemporaryDirectory(prefix="dp-")


def fake_application() -> Starlette:
    """The application with an engine that is open already, without a process around it."""
    state = State(Home.at(_DIRECTORY.name), FakeEngine.open)
    asyncio.run(state.open())
    return application(state)


schema = schemathesis.openapi.from_asgi("/openapi.json", fake_application())


@schema.exclude(operation_id=["sandboxLogs", "events"]).parametrize()
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_operation_answers_as_it_says(case: schemathesis.Case[Any]) -> None:
    response = case.call()
    case.validate_response(response, checks=list(CHECKS))
    if response.status_code != 200:
        error = response.json()["error"]
        assert {"code", "message", "hint", "exit_code"} <= error.keys()
        assert response.status_code < 500 or error["code"] == "not_supported"


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    described = {
        (method.upper(), path)
        for path, methods in document()["paths"].items()
        for method in methods
    }
    assert described == {(route.method, route.path) for route in ROUTES}
    served = set()
    for route in fake_application().routes:
        assert isinstance(route, (Route, WebSocketRoute))
        methods = (route.methods or set()) if isinstance(route, Route) else {"GET"}
        served |= {(method, route.path) for method in methods if method != "HEAD"}
    assert served == described


def test_operation_ids_are_unique() -> None:
    operations = [route.operation for route in ROUTES]
    assert len(set(operations)) == len(operations)


def schemas(node: Any) -> list[Any]:
    if isinstance(node, list):
        return [found for item in node for found in schemas(item)]
    if not isinstance(node, dict):
        return []
    own = [node["schema"]] if "schema" in node else []
    return own + [found for item in node.values() for found in schemas(item)]


def test_every_schema_is_valid_and_every_reference_leads_somewhere() -> None:
    made = document()
    components = made["components"]["schemas"]
    assert {"ExecRequest", "Control", "Report", "ErrorAnswer", "RunRequest"} <= components.keys()
    for one in [*components.values(), *schemas(made["paths"])]:
        jsonschema.Draft202012Validator.check_schema(one)
    text = json.dumps(made)
    for part in text.split('"$ref": "#/components/schemas/')[1:]:
        assert part.split('"')[0] in components


@pytest.mark.parametrize("route", [route for route in ROUTES if not route.stream])
def test_every_verb_has_a_handler_and_an_answer(route: Any) -> None:
    assert route.handler is not None
    assert route.answer is not None
