"""`make install`: what it puts where, that it works there by itself, and that it goes again."""

from __future__ import annotations

import configparser
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.daemon.server import tell_supervisor
from diapause.store.home import Home
from tests.framework import sources
from tests.framework.processes import end_processes

INSTALL = [sys.executable, str(sources.ROOT / "tools/install.py")]
RUN_S = 120


def install(*words: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the installer as somebody whose home that is."""
    return subprocess.run(
        [*INSTALL, *map(str, words)], env={**os.environ, "HOME": str(home)}, capture_output=True,
        text=True, timeout=RUN_S,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's home with an installation in .local."""
    user = tmp_path_factory.mktemp("user")
    done = install(user / ".local", home=user)
    assert done.returncode == 0, done
    yield user
    shutil.rmtree(user)


def run(place: Path, *words: str, home: Home | None = None) -> subprocess.CompletedProcess[str]:
    """The installed program, as its user and from a directory that must not matter."""
    environment = {"HOME": str(place), "PATH": os.environ["PATH"]}
    if home is not None:
        environment["DIAPAUSE_HOME"] = str(home.root)
    return subprocess.run(
        [place / ".local/bin/diapause", *words], env=environment, cwd=sources.ROOT / "src",
        capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip


def test_the_program_works_from_where_it_is(place: Path, home: Home) -> None:
    """The daemon that it starts is the installed one too."""
    assert run(place, "--version").stdout.startswith("diapause, version ")
    try:
        done = run(place, "ps", home=home)
        assert (done.returncode, done.stderr) == (0, ""), done
        pid = int(home.serve_lock.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert command[0] == os.fsencode(place / ".local/lib/diapause/bin/python3")
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert f"{place}/.local/lib/diapause" in maps
        assert str(sources.ROOT / "src/diapause") not in maps
    finally:
        end_processes(home)


def test_it_is_all_below_its_prefix_and_closed_to_writers(place: Path) -> None:
    assert [path.name for path in place.iterdir()] == [".local"]
    for path in place.rglob("*"):
        if not path.is_symlink():
            assert not path.stat().st_mode & stat.S_IWOTH, path
    natives = list(place.glob(".local/lib/diapause/lib/python3*/site-packages/diapause/native/*"))
    assert {path.name for path in natives} >= {"diapause-agent", "libdiapause_tracker.so"}


def test_completions_lie_where_the_shells_look(place: Path) -> None:
    share = place / ".local/share"
    bash = share / "bash-completion/completions/diapause"
    assert "_DIAPAUSE_COMPLETE=bash_complete" in bash.read_text()
    subprocess.run(["bash", "-n", bash], check=True, timeout=RUN_S)
    zsh = (share / "zsh/site-functions/_diapause").read_text()
    assert zsh.startswith("#compdef diapause")
    fish = (share / "fish/vendor_completions.d/diapause.fish").read_text()
    assert "complete --no-files --command diapause" in fish


def test_a_user_gets_a_unit_of_their_own(place: Path) -> None:
    unit = place / ".local/share/systemd/user/diapause.service"
    read = _read_unit(unit)
    assert read["Service"]["ExecStart"] == f'"{place}/.local/bin/diapause" serve'
    assert read["Install"]["WantedBy"] == "default.target"
    assert not (place / ".local/lib/systemd").exists()


def test_the_units_let_guests_live(place: Path) -> None:
    """A unit that ends what is in its control group would end guests."""
    packaging = sources.ROOT / "packaging"
    for unit in (packaging / "diapause.service", packaging / "user/diapause.service"):
        service = _read_unit(unit)["Service"]
        wanted = {
            "Type": "notify", "KillMode": "process", "OOMPolicy": "continue",
            "Restart": "on-failure", "Delegate": "memory pids", "DelegateSubgroup": "daemon",
            "UMask": "0077",
        }  # fmt: skip
        assert {key: service[key] for key in wanted} == wanted


def test_destdir_is_in_front_and_in_no_file_and_uninstall_leaves_nothing(
    place: Path, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    done = install("/opt/dia%pause", stage, home=place)
    assert done.returncode == 0, done
    target = stage / "opt/dia%pause"
    assert str(stage) not in (target / "bin/diapause").read_text()
    unit = target / "lib/systemd/system/diapause.service"
    assert 'ExecStart="/opt/dia%%pause/bin/diapause" serve' in unit.read_text()
    assert (target / "lib/systemd/user/diapause.service").exists()
    _verify(unit, target)
    done = install("--uninstall", "/opt/dia%pause", stage, home=place)
    assert done.returncode == 0, done
    assert [path for path in target.rglob("*") if not path.is_dir()] == []


def _verify(unit: Path, target: Path) -> None:
    """By systemd itself where it is there; the program has to be where the unit says."""
    if (analyze := shutil.which("systemd-analyze")) is None:
        return
    text = unit.read_text().replace("/opt/dia%%pause", str(target).replace("%", "%%"))
    unit.write_text(text)
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, timeout=RUN_S)
    complaints = [
        line
        for line in done.stderr.splitlines()
        # Newer than some of the versions that are still about, which say so and go on.
        if "diapause.service" in line and not ("Unknown key" in line and "DelegateSubgroup" in line)
    ]
    assert complaints == [], done


def test_again_is_an_upgrade_and_what_was_cut_off_is_no_hindrance(place: Path) -> None:
    left = place / ".local/lib/diapause.new"
    left.mkdir()
    (left / "half").touch()
    done = install(place / ".local", home=place)
    assert done.returncode == 0, done
    assert [path.name for path in (place / ".local/lib").iterdir()] == ["diapause"]
    assert run(place, "--version").returncode == 0


def test_a_relative_prefix_is_refused(place: Path) -> None:
    done = install("local", home=place)
    assert (done.returncode, "absolute" in done.stderr) == (2, True)


def test_a_supervisor_is_told_and_one_that_is_gone_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(address))
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))
        tell_supervisor("READY=1")
        assert supervisor.recv(100) == b"READY=1"
    address.unlink()
    tell_supervisor("STOPPING=1")


def _read_unit(path: Path) -> configparser.ConfigParser:
    read = configparser.ConfigParser(interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read_string(path.read_text())
    return read
