"""Install what `make setup` built: an environment of its own, launcher, units, completions.

    usage: install.py [--uninstall] PREFIX [DESTDIR]

    PREFIX/lib/diapause/                       the environment: our package and what it needs
    PREFIX/bin/diapause                        the launcher
    PREFIX/share/bash-completion/completions/  and those of zsh and fish
    PREFIX/lib/systemd/{system,user}/          the units; below a user's home the user's alone,
                                               in PREFIX/share/systemd/user/

The distributions that the lock names are copied from .venv, where their digests were checked: an
installation needs no network, and gets what was tested. Everything is put together beside its place
and renamed into it; a daemon that runs goes on with what it has loaded, and should be restarted.
"""

from __future__ import annotations

import argparse
import compileall
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPLETIONS = {
    "bash": "share/bash-completion/completions/diapause",
    "zsh": "share/zsh/site-functions/_diapause",
    "fish": "share/fish/vendor_completions.d/diapause.fish",
}
_BUILT = ("src/diapause/_core.abi3.so", "src/diapause/native/diapause-agent")


def main() -> int:
    """Install or uninstall; the exit code."""
    parser = argparse.ArgumentParser(description="Install what `make setup` built.")
    parser.add_argument("prefix", type=Path)
    parser.add_argument("destdir", nargs="?", default="")
    parser.add_argument("--uninstall", action="store_true")
    given = parser.parse_args()
    prefix = given.prefix.expanduser()
    if not prefix.is_absolute():
        parser.error(f"PREFIX has to be an absolute path, not {prefix}")
    target = Path(f"{given.destdir}{prefix}") if given.destdir else prefix
    try:
        (uninstall if given.uninstall else install)(prefix, target)
    except PermissionError as error:
        print(f"install: {error}", file=sys.stderr)
        print("install: as an ordinary user: make install PREFIX=$HOME/.local", file=sys.stderr)
        return 1
    return 0


def install(prefix: Path, target: Path) -> None:
    """Put everything below `target`, to be used at `prefix`."""
    if missing := [name for name in _BUILT if not (ROOT / name).exists()]:
        raise SystemExit(f"install: {missing[0]} is not built; `make setup` builds it")
    environment = target / "lib/diapause"
    fresh = environment.with_name("diapause.new")
    _make_environment(fresh)
    _swap(fresh, environment)
    _write(target / "bin/diapause", _launcher(prefix), 0o755)
    for shell, place in COMPLETIONS.items():
        _write(target / place, _completion(environment, shell), 0o644)
    for place, source in _units(prefix).items():
        unit = (ROOT / "packaging" / source).read_text()
        _write(
            target / place, unit.replace("@BINDIR@", str(prefix / "bin").replace("%", "%%")), 0o644
        )
    print(f"install: {prefix}/bin/diapause is there")


def uninstall(prefix: Path, target: Path) -> None:
    """Remove what `install` put there; homes stay (`diapause system reset` removes one)."""
    places = ["bin/diapause", *COMPLETIONS.values(), *_units(prefix)]
    for place in places:
        (target / place).unlink(missing_ok=True)
    for name in ("diapause", "diapause.new", "diapause.old"):
        if (target / "lib" / name).exists():
            shutil.rmtree(target / "lib" / name)
    print(f"install: nothing of Diapause is left in {prefix}")


def _make_environment(place: Path) -> None:
    if place.exists():  # of an installation that was cut off
        shutil.rmtree(place)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(place)
    for script in (place / "bin").glob("[Aa]ctivate*"):
        script.unlink()  # they hold the path that this directory has now
    [packages] = place.glob("lib/python3*/site-packages")
    for name in _locked():
        _copy_distribution(name, packages)
    shutil.copytree(
        ROOT / "src/diapause", packages / "diapause", ignore=shutil.ignore_patterns("__pycache__")
    )
    compileall.compile_dir(packages, quiet=2, workers=1)


def _locked() -> list[str]:
    lock = (ROOT / "requirements/run.lock").read_text()
    return re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.MULTILINE)


def _copy_distribution(name: str, packages: Path) -> None:
    """The files that the distribution's own record names, but for scripts."""
    files = metadata.distribution(name).files
    if not files:
        raise SystemExit(f"install: {name} has no record of its files in .venv")
    for file in files:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        place = packages / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file.locate(), place)


def _swap(fresh: Path, place: Path) -> None:
    old = place.with_name("diapause.old")
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    if old.exists():
        shutil.rmtree(old)


def _launcher(prefix: Path) -> str:
    # -P: the working directory is no place to import from.
    return f'#!/bin/sh\nexec "{prefix}/lib/diapause/bin/python3" -P -m diapause "$@"\n'


def _completion(environment: Path, shell: str) -> str:
    command = [str(environment / "bin/python3"), "-P", "-m", "diapause", "completion", shell]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _units(prefix: Path) -> dict[str, str]:
    """Where systemd looks, and for which unit."""
    if prefix.is_relative_to(Path.home()):
        return {"share/systemd/user/diapause.service": "user/diapause.service"}
    return {
        "lib/systemd/system/diapause.service": "diapause.service",
        "lib/systemd/user/diapause.service": "user/diapause.service",
    }


def _write(place: Path, text: str, mode: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.new")
    fresh.write_text(text)
    fresh.chmod(mode)
    fresh.replace(place)


if __name__ == "__main__":
    sys.exit(main())
