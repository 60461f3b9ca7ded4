"""Imports point downward: a lower room never knows who lives above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.framework import sources

# From the top down; rooms of one floor do not know each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("daemon",),
    ("sandbox",),
    ("driver", "snapshot"),
    ("guest", "pager"),
    ("store",),
    ("catalog",),
    ("events", "journal", "migrations"),
    ("database",),
    ("_core",),
    ("config", "model", "operation"),
    ("errors", "limits"),
    ("units", "__version__"),
)
# The client side of the daemon: what the command line may know of it. `serve` is the daemon.
CLI_MAY_IMPORT = {
    "_core", "daemon.client", "daemon.exec_wire", "daemon.start", "store.home",
    "daemon.reset", "daemon.support",
    "errors", "limits", "model", "units", "__version__",
}  # fmt: skip
SERVE = {"cli.serve"}
HEIGHT = {room: -number for number, floor in enumerate(FLOORS) for room in floor}
PACKAGE = sources.ROOT / "src" / "diapause"


def test_every_room_has_a_floor() -> None:
    """A new package has to say where it belongs."""
    rooms = {_room(_module(path)) for path in sources.package_files()} - {""}
    assert rooms - HEIGHT.keys() == set()


def test_imports_point_downward() -> None:
    """For every import of the package, at any depth of a function."""
    upward = [
        f"{module} imports {target}"
        for module, target in _imports()
        if _room(module) not in ("", _room(target))
        and HEIGHT[_room(target)] >= HEIGHT[_room(module)]
    ]
    assert upward == []


def test_the_command_line_knows_only_the_client() -> None:
    """The engine stays behind the socket, and the command line starts quickly."""
    beyond = [
        f"{module} imports {target}"
        for module, target in _imports()
        if _room(module) == "cli"
        and module not in SERVE
        and _room(target) != "cli"
        and target not in CLI_MAY_IMPORT
        and _room(target) not in CLI_MAY_IMPORT
    ]
    assert beyond == []


def _imports() -> Iterator[tuple[str, str]]:
    """Pairs of modules of the package, without its name: who imports whom."""
    for path in sources.package_files():
        module = _module(path)
        for node in ast.walk(sources.tree(path)):
            for target in _targets(node, module):
                yield module, target


def _targets(node: ast.AST, module: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("diapause."):
                yield alias.name.removeprefix("diapause.")
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module} imports relatively"
        name = node.module or ""
        if name == "diapause" or (name.startswith("diapause.") and _is_package(name)):
            for alias in node.names:
                yield _shortest(f"{name}.{alias.name}".removeprefix("diapause."))
        elif name.startswith("diapause."):
            yield name.removeprefix("diapause.")


def _is_package(name: str) -> bool:
    return (PACKAGE.parent / name.replace(".", "/")).is_dir()


def _shortest(target: str) -> str:
    """`store.home` where that is a module, `driver` where it is something in a package."""
    parent = target.rpartition(".")[0]
    path = PACKAGE / target.replace(".", "/")
    is_module = path.is_dir() or path.with_suffix(".py").exists()
    return target if is_module or not parent else parent


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _room(module: str) -> str:
    return module.split(".")[0]
