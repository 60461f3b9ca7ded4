"""`support-bundle`: what a report needs is in it, and no secret that was anywhere near."""

from __future__ import annotations

import contextlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from diapause.catalog import Catalog
from tests.daemon.test_events import sandbox, snapshot
from tests.framework.fake_home import FakeHome

SECRET = "hunter2-in-every-place"


def contents(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle by its name."""
    with tarfile.open(bundle) as archive:
        found = {}
        for entry in archive:
            file = archive.extractfile(entry)
            assert file is not None, entry
            found[entry.name.removeprefix("diapause-support/")] = file.read()
        return found


@pytest.fixture
def bundle(place: FakeHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The bundle of a home in which a secret was put wherever there is a place for one."""
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("DIAPAUSE_TOKEN", SECRET)
    web = place.sandbox("web")
    place.run(
        "exec", "-i", "-e", f"TOKEN={SECRET}", web, "--", "show", SECRET, given=SECRET.encode()
    )
    directory = place.home.sandbox(web)
    directory.mkdir(exist_ok=True)
    for name in ("console.log", "console.log.1", "disk0.0000001.qcow2", "capture.mark"):
        (directory / name).write_text(SECRET)
    (directory / "vmm.log").write_text("qemu-system-x86_64: a warning")
    place.home.snapshot("5a").mkdir()
    for path in (
        place.home.snapshot("5a") / "device-state", place.home.builds / "00",
        place.home.buffers / "5a.buffer", place.home.root / "notes.txt",
    ):  # fmt: skip
        path.write_text(SECRET)
    error = {"code": "vmm_failed", "message": "it ended", "fields": {"console": SECRET}}
    with contextlib.closing(Catalog(place.home.catalog)) as catalog:
        catalog.put_sandbox(sandbox("failed", id=web, error=error, machine_id=SECRET))
        catalog.put_snapshot(snapshot("failed", error=error, command_line=[SECRET]), durable=False)
        catalog.journal.begin("0f", "run", web, None, "boot")
        catalog.journal.step("0f", 0, "files")
        catalog.journal.keep_request(SECRET, SECRET, "0f", "boot")
        catalog.journal.answer_request(SECRET, "0f", SECRET.encode())
    place.json("pause", web)
    document = place.json("support-bundle", "-o", str(tmp_path / "report.tar.gz"))
    made = Path(document["bundle"])
    assert (made.stat().st_mode & 0o777, made.stat().st_size) == (0o600, document["size_bytes"])
    assert document["missing"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["report.tar.gz"]
    return contents(made)


def test_what_a_report_needs_is_in_it(bundle: dict[str, bytes]) -> None:
    assert set(bundle) >= {
        "about.json", "doctor.json", "metrics.txt", "sandboxes.json", "snapshots.json",
        "operations.json", "steps.json", "events.json", "facts.json", "files.txt", "serve.log",
        "missing.json",
    }  # fmt: skip
    [row] = _json(bundle, "sandboxes.json")
    assert (row["name"], row["state"]) == ("web", "failed")
    assert row["error"] == {"code": "vmm_failed", "message": "it ended"}
    assert [row["verb"] for row in _json(bundle, "operations.json")] == ["run"]
    assert _json(bundle, "events.json")
    assert "DIAPAUSE_TOKEN" in _json(bundle, "about.json")["switches"]
    assert b"pauseSandbox" in bundle["serve.log"]
    assert b"a warning" in next(text for name, text in bundle.items() if name.startswith("vmm/"))
    assert b"device-state" in bundle["files.txt"]


def test_no_secret_is_in_it(bundle: dict[str, bytes]) -> None:
    assert [name for name, content in bundle.items() if SECRET.encode() in content] == []


def test_it_is_made_though_no_daemon_starts(place: FakeHome, tmp_path: Path) -> None:
    place.home.create()
    (place.home.root / "newer").touch()
    place.home.catalog.write_bytes(b"no database at all" * 100)
    document = place.json("support-bundle", "-o", str(tmp_path / "report.tar.gz"))
    assert {"doctor.json", "sandboxes.json"} <= set(document["missing"])
    found = contents(tmp_path / "report.tar.gz")
    assert "HomeNewer" in _json(found, "missing.json")["doctor.json"]
    assert "about.json" in found
    assert b"home_newer" in found["serve.log"] or b"newer" in found["serve.log"]


def test_large_logs_are_cut(place: FakeHome, tmp_path: Path) -> None:
    place.sandbox()
    with place.home.serve_log.open("ab") as log:
        log.truncate(64 << 20)
        log.write(b"\nthe last line\n")
    place.run("support-bundle", "-o", str(tmp_path / "report.tar.gz"))
    log_part = contents(tmp_path / "report.tar.gz")["serve.log.1"]  # it was full
    assert len(log_part) == 4 << 20
    assert b"the last line" in log_part


def test_a_place_that_cannot_be_written_is_a_typed_error(place: FakeHome) -> None:
    document = place.json("support-bundle", "-o", "/proc/nowhere/report.tar.gz", code=22)
    assert document["error"]["code"] == "storage_failed"


def _json(found: dict[str, bytes], name: str) -> Any:
    return json.loads(found[name])
