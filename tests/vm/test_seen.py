"""What a real guest's life shows: one id from the request to the guest's kernel, figures, events.

And what is gone after it: a bundle without secrets, a reset that leaves nothing.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diapause.catalog import Catalog
from diapause.daemon.start import connect
from diapause.guest.images import Image
from tests.framework.fake_home import eventually, gone
from tests.framework.processes import processes_of
from tests.framework.sandbox import Daemon, Sandbox, real_home
from tests.vm.test_exec import command

pytestmark = pytest.mark.vm

BOUND_S = 300.0
OPERATION = "0123456789abcdef"
SECRET = "hunter2-in-a-guest"


def post(daemon: Daemon, path: str, body: dict[str, Any], operation: str) -> tuple[str, Any]:
    """Ask with an id of our own; the id that the answer has, and the answer."""
    connection = http.client.HTTPConnection("diapause")
    connection.sock = connect(daemon.home, None)
    connection.sock.settimeout(BOUND_S)
    connection.request("POST", path, json.dumps(body), {"Operation-Id": operation})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return str(response.getheader("Operation-Id")), answer


def value(text: str, name: str, **labels: str) -> float:
    """A sample of the metrics; 0 where nothing was counted yet."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def run(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[bytes]:
    """The command line on this home."""
    return subprocess.run(
        command(daemon, *words), capture_output=True, stdin=subprocess.DEVNULL, timeout=BOUND_S
    )


def test_one_id_from_the_request_to_the_guests_kernel(daemon: Daemon, guest: Sandbox) -> None:
    """Header, log, journal, events, and what the agent writes where the guest can read it."""
    body = {"durability": "process", "quiesce": True}
    named, saved = post(daemon, f"/v1/sandboxes/{guest.id}/snapshots", body, OPERATION)
    assert named == OPERATION
    assert saved["notes"] == []
    lines = [json.loads(line) for line in daemon.home.serve_log.read_text().splitlines()]
    mine = [line for line in lines if line.get("operation") == OPERATION]
    [verb] = [line for line in mine if line.get("verb") == "save"]
    assert (verb["sandbox"], verb["snapshot"]) == (guest.id, saved["snapshot"])
    assert (verb["outcome"], verb["phases_ms"].keys() >= {"prepare", "freeze"}) == ("done", True)
    assert any("saveSandbox" in line["message"] for line in mine)
    catalog = Catalog(daemon.home.catalog)
    try:
        journaled = catalog.journal.operations_of(OPERATION)
        events = [event for event in catalog.journal.events() if event.operation == OPERATION]
    finally:
        catalog.close()
    assert [row.verb for row in journaled] == ["save"]
    assert [(event.kind, event.snapshot) for event in events] == [("saved", saved["snapshot"])]
    kernel = guest.sh("dmesg")
    for what in ("freezes file systems", "thawed file systems"):
        assert f"diapause-agent: {what} for operation {OPERATION}" in kernel


def test_the_figures_of_a_life(daemon: Daemon, guest: Sandbox) -> None:
    before = daemon.client.metrics()
    saved = guest.save()
    guest.pause()
    after = daemon.client.metrics()

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("diapause_verbs_total", verb="save", outcome="done") == 1
    assert grown("diapause_verbs_total", verb="pause", outcome="done") == 1
    assert grown("diapause_verb_duration_seconds_count", verb="pause") == 1
    assert grown("diapause_verb_phase_seconds_count", verb="save", phase="freeze") == 1
    assert grown("diapause_frozen_seconds_count", verb="save") == 1
    frozen_ms = grown("diapause_frozen_seconds_sum", verb="save") * 1e3
    assert frozen_ms == pytest.approx(saved.frozen_ms, abs=0.01)
    assert grown("diapause_captured_bytes_total") >= saved.dirty_pages * 4096
    assert value(after, "diapause_sandboxes", state="paused") == 1
    assert value(after, "diapause_sandboxes", state="running") >= 1
    assert grown("diapause_events_total") >= 2


def test_the_events_of_a_life(daemon: Daemon, booted: Sandbox) -> None:
    with booted.forked() as fork:
        fork.pause()
        fork.resume()
    kinds = [event.kind for event in daemon.client.events() if event.sandbox == fork.id]
    life = [kind for kind in kinds if kind not in ("saved", "packed")]
    assert life == ["forked", "running", "paused", "resumed", "removed"]


def test_a_bundle_has_no_secret_of_a_guest(daemon: Daemon, guest: Sandbox, tmp_path: Path) -> None:
    guest.sh(f"echo {SECRET} >/dev/console; echo {SECRET} >/data/file; sync")
    run(daemon, "exec", "-e", f"TOKEN={SECRET}", guest.id, "--", "echo", SECRET)
    console = daemon.home.sandbox(guest.id) / "console.log"
    eventually("the console", lambda: SECRET.encode() in console.read_bytes(), 60)
    guest.save("disk")
    place = tmp_path / "report.tar.gz"
    done = run(daemon, "support-bundle", "-o", str(place))
    assert done.returncode == 0, done
    with tarfile.open(place) as archive:
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None
            assert SECRET.encode() not in content.read(), entry.name
    assert place.stat().st_size < 32 << 20


def test_a_reset_leaves_nothing(tiny_image: Image) -> None:
    with real_home(tiny_image) as daemon:
        home = daemon.home
        guest = daemon.run()
        guest.save()
        pids = [daemon.pid, *daemon.vmms()]
        assert len(pids) == 2
        done = run(daemon, "system", "reset", "--yes")
        assert done.returncode == 0, done
        assert all(gone(pid) for pid in pids)
        assert processes_of(home) == []
        assert [p for p in (home.root, home.sockets, home.buffers) if p.exists()] == []
