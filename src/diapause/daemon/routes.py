"""Every HTTP route, once: the application and the OpenAPI document are both made from `ROUTES`.

A handler is a plain function that runs in a worker thread with the engine and a checked `Call`.
The two streaming routes (console log, exec) have their own handlers and stand in the table too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from diapause import model
from diapause.daemon.engine_api import Engine
from diapause.model import Answer, Event


class SystemAnswer(Answer):
    """The daemon that answers; `ready` once it has recovered its home."""

    version: str
    pid: int
    home: str
    ready: bool


class ErrorAnswer(Answer):
    """Every failure, under the status of its class."""

    error: ErrorBody


class ErrorBody(Answer):
    """`code` is stable; `exit_code` is what the command line exits with."""

    code: str
    message: str
    hint: str
    exit_code: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One request, decoded and checked."""

    ref: str = ""
    flags: dict[str, bool] = field(default_factory=dict)
    numbers: dict[str, int | None] = field(default_factory=dict)
    body: Any = None

    @property
    def line(self) -> str:
        """The sandbox whose verbs it stands in line with, as it was named; or an empty string."""
        return self.ref or str(getattr(self.body, "source", ""))


# Of a parameter that is a number: what every client and SQLite can hold.
NUMBER_MAX = 2**53

Handler = Callable[[Engine, Call], Any]


@dataclass(frozen=True)
class Route:
    """One method of one path; `stream` names what answers it instead of `handler`."""

    method: str
    path: str
    operation: str
    summary: str
    answer: Any = None
    request: type[msgspec.Struct] | None = None
    handler: Handler | None = None
    flags: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)  # whole, not negative; may be left out
    stream: str = ""
    # A body that may be left out stands for the request's defaults.
    body_needed: bool = True


def _get(path: str, operation: str, summary: str, answer: Any, handler: Handler) -> Route:
    return Route("GET", path, operation, summary, answer, handler=handler)


SANDBOX = "/v1/sandboxes/{ref}"
OPERATION = "/v1/operations/{ref}"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/system", "system", "The daemon itself", SystemAnswer, stream="system"),
    Route(
        "POST", "/v1/doctor", "doctor", "Prove what this host can do", model.DoctorAnswer,
        handler=lambda engine, call: engine.doctor(),
    ),
    Route(
        "POST", "/v1/bench", "bench", "Measure what this host does", model.BenchAnswer,
        model.BenchRequest, lambda engine, call: engine.bench(call.body), body_needed=False,
    ),
    _get(
        "/v1/images", "listImages", "All images", list[model.ImageInfo],
        lambda engine, call: engine.images(),
    ),
    Route(
        "POST", "/v1/images", "buildImage", "Build an image; one that exists stays as it is",
        model.ImageInfo, model.ImageBuildRequest,
        lambda engine, call: engine.build_image(call.body),
    ),
    Route(
        "POST", "/v1/images/import", "importImage", "Make an image of files on the daemon's host",
        model.ImageInfo, model.ImageImportRequest,
        lambda engine, call: engine.import_image(call.body),
    ),
    _get(
        "/v1/images/{ref}", "inspectImage", "One image, and who needs it", model.ImageDetail,
        lambda engine, call: engine.inspect_image(call.ref),
    ),
    Route(
        "DELETE", "/v1/images/{ref}", "removeImage", "Remove an image that nobody needs",
        model.RemoveImageAnswer, handler=lambda engine, call: engine.remove_image(call.ref),
    ),
    Route(
        "GET", "/v1/sandboxes", "listSandboxes", "Sandboxes", list[model.SandboxRow],
        handler=lambda engine, call: engine.sandboxes(call.flags["all"]),
        flags={"all": "also stopped, failed and half-removed ones"},
    ),
    Route(
        "POST", "/v1/sandboxes", "runSandbox", "Make a sandbox and start it", model.RunAnswer,
        model.RunRequest, lambda engine, call: engine.run(call.body), body_needed=False,
    ),
    _get(
        SANDBOX, "inspectSandbox", "One sandbox", model.SandboxDetail,
        lambda engine, call: engine.inspect(call.ref),
    ),
    Route(
        "DELETE", SANDBOX, "removeSandbox", "Remove a sandbox", model.RemoveAnswer,
        handler=lambda engine, call: engine.remove([call.ref], call.flags["force"]),
        flags={"force": "also one that runs"},
    ),
    Route(
        "POST", SANDBOX + "/pause", "pauseSandbox", "Save everything, free the memory",
        model.CaptureAnswer, model.CaptureRequest,
        lambda engine, call: engine.pause(call.ref, call.body), body_needed=False,
    ),
    Route(
        "POST", SANDBOX + "/freeze", "freezeSandbox", "Stop the vCPUs, keep the memory",
        model.FreezeAnswer, handler=lambda engine, call: engine.freeze(call.ref),
    ),
    Route(
        "POST", SANDBOX + "/thaw", "thawSandbox", "Let a frozen sandbox go on",
        model.FreezeAnswer, handler=lambda engine, call: engine.thaw(call.ref),
    ),
    Route(
        "POST", SANDBOX + "/resume", "resumeSandbox", "Bring a paused sandbox back",
        model.ResumeAnswer, model.ResumeRequest,
        lambda engine, call: engine.resume(call.ref, call.body), body_needed=False,
    ),
    Route(
        "POST", SANDBOX + "/restore", "restoreSandbox", "Put a sandbox back to a snapshot",
        model.RestoreAnswer, model.RestoreRequest,
        lambda engine, call: engine.restore(call.ref, call.body),
    ),
    Route(
        "POST", SANDBOX + "/snapshots", "saveSandbox", "Take a snapshot; the guest goes on",
        model.CaptureAnswer, model.CaptureRequest,
        lambda engine, call: engine.save(call.ref, call.body), body_needed=False,
    ),
    Route(
        "GET", SANDBOX + "/logs", "sandboxLogs", "The guest's console, raw", stream="logs",
        flags={"follow": "go on as it grows, until the client leaves"},
        numbers={"tail": "only so many of its last lines"},
    ),
    Route(
        "GET", SANDBOX + "/exec", "execInSandbox", "Run a command: a WebSocket, see docs/api.md",
        stream="exec",
    ),
    Route(
        "GET", SANDBOX + "/console", "sandboxConsole",
        "Read and type on the console: a WebSocket, see docs/api.md", stream="console",
    ),
    Route(
        "POST", "/v1/forks", "fork", "Make new sandboxes from a sandbox or a snapshot",
        model.ForkAnswer, model.ForkRequest, lambda engine, call: engine.fork(call.body),
    ),
    _get(
        "/v1/snapshots", "listSnapshots", "All snapshots", list[model.SnapshotDetail],
        lambda engine, call: engine.snapshots(),
    ),
    _get(
        "/v1/snapshots/{ref}", "inspectSnapshot", "One snapshot", model.SnapshotDetail,
        lambda engine, call: engine.inspect_snapshot(call.ref),
    ),
    Route(
        "GET", "/v1/events", "events", "What happened, oldest first: one JSON document a line",
        Event, stream="events",
        flags={"follow": "go on as more happens, until the client leaves"},
        numbers={"after": "only those with a higher `sequence`"},
    ),
    Route("GET", "/metrics", "metrics", "Counters and figures, for Prometheus", stream="metrics"),
    Route(
        "DELETE", "/v1/snapshots/{ref}", "removeSnapshot", "Remove a snapshot; gc takes its files",
        model.RemoveSnapshotAnswer, handler=lambda engine, call: engine.remove_snapshot(call.ref),
    ),
    Route(
        "POST", "/v1/gc", "gc", "Delete what nothing refers to", model.GcAnswer, model.GcRequest,
        lambda engine, call: engine.gc(call.body), body_needed=False,
    ),
    Route(
        "POST", "/v1/check", "check", "Read everything and name what is damaged",
        model.CheckAnswer, model.CheckRequest, lambda engine, call: engine.check(call.body),
        body_needed=False,
    ),
    Route(
        "POST", "/v1/snapshots/{ref}/verify", "verifySnapshot", "Read all of one snapshot",
        model.CheckAnswer, handler=lambda engine, call: engine.verify_snapshot(call.ref),
    ),
    Route(
        "POST", "/v1/snapshots/{ref}/diff", "diffSnapshots", "What differs from another snapshot",
        model.DiffAnswer, model.DiffRequest,
        lambda engine, call: engine.diff_snapshots(call.ref, call.body.other),
    ),
    _get("/v1/df", "df", "What takes space", model.DfAnswer, lambda engine, call: engine.df()),
    _get(
        "/v1/pager", "pager", "The processes that serve memory on demand", model.PagerAnswer,
        lambda engine, call: engine.pager(),
    ),
    Route(
        "GET", OPERATION, "inspectOperation", "How far something is that a client asked for",
        model.OperationAnswer, stream="operation",
    ),
    Route(
        "DELETE", OPERATION, "cancelOperation", "Cancel it, if it can still be; answers at once",
        model.OperationAnswer, stream="cancel",
    ),
    Route("GET", "/openapi.json", "openapi", "This API as an OpenAPI document", stream="openapi"),
)  # fmt: skip
