"""The ASGI application: requests decoded and bounded, verbs run, failures typed.

Nothing reaches the engine unchecked, and nothing but JSON with the right status leaves, whatever
goes wrong. The routes are those of `routes.ROUTES`, no more.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.routing import Route as HttpRoute

from diapause import __version__, limits, operation
from diapause.daemon.event_stream import event_stream
from diapause.daemon.exec_stream import console_stream, exec_stream
from diapause.daemon.logs import console
from diapause.daemon.metrics import metrics_response
from diapause.daemon.once import Once, check_key
from diapause.daemon.openapi import document
from diapause.daemon.operations import Asked, of_journal
from diapause.daemon.routes import NUMBER_MAX, ROUTES, Call, Route, SystemAnswer
from diapause.daemon.state import State
from diapause.errors import DiapauseError, InvalidRequest
from diapause.model import OperationAnswer
from diapause.store.files import unexpected_storage_error

log = logging.getLogger("diapause.daemon")

Endpoint = Callable[[Request], Awaitable[Response]]
_FLAG = {"true": True, "1": True, "false": False, "0": False}


def application(state: State) -> Starlette:
    """The application over one daemon's state."""
    made = Starlette(
        routes=_http_routes(state),
        exception_handlers={
            DiapauseError: _failed,
            HTTPException: _refused,
            Exception: partial(_broke, state.home.root),
        },
    )
    # A path with a slash too many is another path, as the document says.
    made.router.redirect_slashes = False
    return made


_SOCKETS = {"exec": exec_stream, "console": console_stream}


def _http_routes(state: State) -> list[BaseRoute]:
    streams: dict[str, Endpoint] = {
        "system": partial(_system, state),
        "operation": partial(_operation, state),
        "cancel": partial(_cancel, state),
        "logs": partial(_logs, state),
        "exec": partial(_needs_websocket, "exec"),
        "console": partial(_needs_websocket, "console"),
        "events": partial(_events, state),
        "metrics": partial(_metrics, state),
        "openapi": partial(_openapi, msgspec.json.encode(document())),
    }
    # One path is one starlette route whatever its methods, so that a wrong method is told from
    # a wrong path, with all that the path allows.
    by_path: dict[str, dict[str, Endpoint]] = {}
    for route in ROUTES:
        endpoint = streams[route.stream] if route.stream else partial(_answer, state, route)
        by_path.setdefault(route.path, {})[route.method] = endpoint
    found: list[BaseRoute] = [
        WebSocketRoute(route.path, partial(_SOCKETS[route.stream], state))
        for route in ROUTES
        if route.stream in _SOCKETS
    ]
    for path, methods in by_path.items():
        found.append(HttpRoute(path, partial(_dispatch, methods), methods=list(methods)))
    return found


async def _dispatch(methods: dict[str, Endpoint], request: Request) -> Response:
    """Starlette answers HEAD where there is GET."""
    method = "GET" if request.method == "HEAD" else request.method
    return await methods[method](request)


async def _answer(state: State, route: Route, request: Request) -> Response:
    call = await _checked(route, request)
    engine = await state.engine()
    assert route.handler is not None, route.operation
    work = partial(route.handler, engine, call)
    if route.method == "GET":
        return json_response(await state.workers.read(work))
    key = request.headers.get("idempotency-key")
    if key is not None:
        check_key(key)
    wanted = request.headers.get("operation-id")
    asked = state.operations.begin(route.operation, call.line or None, wanted)
    request.state.operation = asked.operation.id
    if key is None:
        doing = _plainly(state, call, work)
    else:
        doing = Once(state, engine, asked, key, route, call).perform(work)
    with operation.under(asked.operation):
        encoded = await state.workers.verb(_to_its_end(asked, route, call, doing))
    return Response(encoded, media_type="application/json", headers=_named(request))


async def _plainly(state: State, call: Call, work: Callable[[], object]) -> bytes:
    encoded: bytes = await state.workers.thread(lambda: msgspec.json.encode(work()), call.line)
    return encoded


async def _to_its_end(
    asked: Asked, route: Route, call: Call, doing: Coroutine[Any, Any, bytes]
) -> bytes:
    """Whoever waits for the operation learns what came of it, though its client may have left."""
    began = time.monotonic()
    try:
        encoded = await doing
    except BaseException as error:
        code = error.code if isinstance(error, DiapauseError) else DiapauseError.code
        _log_verb(route, call, began, f"{code}: {error}")
        asked.end(error)
        raise
    _log_verb(route, call, began, "done")
    asked.end(encoded)
    return encoded


def _log_verb(route: Route, call: Call, began: float, outcome: str) -> None:
    elapsed_ms = (time.monotonic() - began) * 1000
    known = operation.current()
    extra = {"operation": known.id} if known is not None else {}
    log.info("%s %r in %.1f ms: %s", route.operation, call.ref, elapsed_ms, outcome, extra=extra)


def _named(request: Request) -> dict[str, str]:
    """The id of what was done for a request, as a header of its answer."""
    known = getattr(request.state, "operation", None)
    return {} if known is None else {"Operation-Id": known}


async def _checked(route: Route, request: Request) -> Call:
    body = await _body(request)
    if route.request is None:
        if body:
            raise InvalidRequest(what="the request", cause="it takes no body")
        return Call(reference(request), *_parameters(route, request))
    if not body and not route.body_needed:
        return Call(reference(request), *_parameters(route, request), route.request())
    try:
        decoded = msgspec.json.decode(body, type=route.request)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(what="the request body", cause=error) from error
    return Call(reference(request), *_parameters(route, request), decoded)


async def _body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limits.REQUEST_BODY_BYTES_MAX:
            cause = f"it is larger than {limits.REQUEST_BODY_BYTES_MAX} bytes"
            raise InvalidRequest(what="the request body", cause=cause)
        parts.append(part)
    return b"".join(parts)


def reference(request: Request) -> str:
    """The id, prefix or name in the path; an empty string where the path has none."""
    ref = str(request.path_params.get("ref", ""))
    if len(ref) > limits.REFERENCE_LENGTH_MAX:
        cause = f"it is longer than {limits.REFERENCE_LENGTH_MAX} characters"
        raise InvalidRequest(what="the id or name", cause=cause)
    return ref


def _parameters(route: Route, request: Request) -> tuple[dict[str, bool], dict[str, int | None]]:
    flags = dict.fromkeys(route.flags, False)
    numbers: dict[str, int | None] = dict.fromkeys(route.numbers)
    for name, value in request.query_params.multi_items():
        if name in numbers:
            numbers[name] = _number(name, value)
        elif name not in flags:
            raise InvalidRequest(what=f"the parameter {name!r}", cause="there is no such parameter")
        elif value not in _FLAG:
            raise InvalidRequest(what=f"the parameter {name!r}", cause="it is true or false")
        else:
            flags[name] = _FLAG[value]
    return flags, numbers


def _number(name: str, value: str) -> int:
    if value.isascii() and value.isdigit() and len(value) <= 16 and int(value) <= NUMBER_MAX:
        return int(value)
    cause = f"it is a whole number from 0 to {NUMBER_MAX}"
    raise InvalidRequest(what=f"the parameter {name!r}", cause=cause)


async def _system(state: State, request: Request) -> Response:
    await _checked(_route("system"), request)
    return json_response(
        SystemAnswer(
            version=__version__, pid=os.getpid(), home=str(state.home.root), ready=state.ready
        )
    )


async def _operation(state: State, request: Request) -> Response:
    call = await _checked(_route("operation"), request)
    return json_response(await _asked(state, call.ref))


async def _cancel(state: State, request: Request) -> Response:
    """Asked for; what has ended or can't be put back any more stays as it is."""
    call = await _checked(_route("cancel"), request)
    if (found := state.operations.under_way(call.ref)) is not None:
        found.operation.cancel()
    return json_response(await _asked(state, call.ref))


async def _asked(state: State, reference: str) -> OperationAnswer:
    if (found := state.operations.find(reference)) is not None:
        return found.answer
    engine = await state.engine()
    answer: OperationAnswer = await state.workers.read(
        lambda: of_journal(engine.journal, reference)
    )
    return answer


async def _logs(state: State, request: Request) -> Response:
    call = await _checked(_route("logs"), request)
    engine = await state.engine()
    path = await state.workers.read(lambda: engine.console_log(call.ref))
    return console(path, request, follow=call.flags["follow"], tail=call.numbers["tail"])


async def _events(state: State, request: Request) -> Response:
    call = await _checked(_route("events"), request)
    engine = await state.engine()
    after = call.numbers["after"] or 0
    return event_stream(engine.events, request, after, follow=call.flags["follow"])


async def _metrics(state: State, request: Request) -> Response:
    await _checked(_route("metrics"), request)
    engine = await state.engine()
    return metrics_response(await state.workers.read(engine.metrics))


async def _needs_websocket(stream: str, request: Request) -> Response:
    await _checked(_route(stream), request)
    cause = f"{stream} is a WebSocket; ask for an upgrade"
    error = InvalidRequest(what="the request", cause=cause)
    return _error_response(error, status=426, headers={"Upgrade": "websocket"})


async def _openapi(encoded: bytes, request: Request) -> Response:
    await _checked(_route("openapi"), request)
    return Response(encoded, media_type="application/json")


def _route(stream: str) -> Route:
    return next(route for route in ROUTES if route.stream == stream)


def json_response(answer: object) -> Response:
    """An answer as JSON."""
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _error_response(
    error: DiapauseError, status: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode({"error": error.to_dict()}),
        status_code=status or error.status,
        media_type="application/json",
        headers=headers,
    )


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, DiapauseError)
    return _error_response(error, headers=_named(request))


async def _refused(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: an unknown path, a method that the path has not."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    typed = InvalidRequest(what=what, cause=f"the API has no such thing ({error.detail})")
    return _error_response(typed, error.status_code, dict(error.headers or {}))


async def _broke(home: Path, request: Request, error: Exception) -> Response:
    """What nobody was ready for: logged whole by starlette's caller, answered in one line."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    what = f"{request.method} {request.url.path}"
    if (refused := unexpected_storage_error(what, home, error)) is not None:
        return _error_response(refused)
    return _error_response(DiapauseError(cause=f"{type(error).__name__}: {error}"))
