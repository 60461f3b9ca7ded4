"""The repository's own files, as tests of style and structure see them."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BUILT = {".git", ".venv", ".cache", "target", "native", "results", "golden", "__pycache__"}
_FOLDERS = (".ci", "benchmarks", "docs", "packaging", "rust", "src", "tests", "tools")
_TEXT = {".py", ".pyi", ".rs", ".sh", ".md", ".toml", ".txt", ".yml", ".json", ".lock"}
_RUST_FUNCTION = re.compile(r"^(\s*)(?:pub(?:\([a-z]+\))? |const |unsafe |extern \"C\" )*fn (\w+)")


@dataclass(frozen=True)
class Function:
    """A function of either language and how many lines it takes."""

    place: str
    lines: int


def texts() -> list[Path]:
    """Every text file that belongs to the repository."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in _FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if not _is_built(path) and _is_text(path))


def python_files() -> list[Path]:
    """Every Python file."""
    return [path for path in texts() if path.suffix == ".py"]


def rust_files() -> list[Path]:
    """Every Rust file."""
    return [path for path in texts() if path.suffix == ".rs"]


def package_files() -> list[Path]:
    """The Python files of the package itself."""
    return [path for path in python_files() if path.is_relative_to(ROOT / "src")]


def relative(path: Path) -> str:
    """A file's name as people write it."""
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(), filename=str(path))


def python_functions(path: Path) -> Iterator[Function]:
    """The functions of a Python file; decorators are not counted."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Function(f"{relative(path)}:{node.name}", node.end_lineno - node.lineno + 1)


def rust_functions(path: Path) -> Iterator[Function]:
    """The functions of a Rust file: rustfmt closes each where it began."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if not (match := _RUST_FUNCTION.match(line)):
            continue
        closing = f"{match[1]}}}"
        end = next((at for at in range(number, len(lines)) if lines[at] == closing), None)
        if end is not None and not line.rstrip().endswith((";", "}")):
            yield Function(f"{relative(path)}:{match[2]}", end - number + 1)


def _is_text(path: Path) -> bool:
    if path.suffix:
        return path.suffix in _TEXT
    # A script, a Makefile, or the input of a fuzzer.
    try:
        path.read_text()
    except UnicodeDecodeError:
        return False
    return True


def _is_built(path: Path) -> bool:
    return bool(_BUILT.intersection(path.relative_to(ROOT).parts))
