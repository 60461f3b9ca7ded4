"""Style that a person would otherwise have to watch: held by tests, eased only by ratchets.

A ratchet is a tuple of what does not hold yet. It may only shrink: a test fails when an entry is no
longer needed, so that nothing can fall back.
"""

from __future__ import annotations

import ast
import re

import pytest

from diapause import errors
from tests.framework import sources
from tools.errors_table import table

LINES_OF_FUNCTION_MAX = 70
LINES_OF_FILE_MAX = 700
COLUMNS_MAX = 100

LONG_FUNCTIONS: tuple[str, ...] = ()
LONG_FILES: tuple[str, ...] = ()
# Error classes that nothing raises yet.
NOT_RAISED: tuple[str, ...] = ()

# Put together here, or this file would find itself.
_UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
_SKIPPED = re.compile(
    r"pytest\.(?:" + "ski" + r"p|x" + r"fail|importor" + r"skip)\b"
    r"|mark\.(?:" + "ski" + r"p|x" + r"fail)"
    r"|#\[ig" + r"nore"
)
_MACHINE_PATHS = re.compile(r"(?<![\w.$}-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me/\w+)/")
_HOSTS = re.compile(
    "|".join(
        name.replace(" ", r"\.")
        for name in (
            "pypi o" + "rg", "pythonhosted o" + "rg", "crates i" + "o/", "debian o" + "rg",
            "npmjs o" + "rg", "golang o" + "rg", "docker i" + "o", "ghcr i" + "o",
        )
    )
)  # fmt: skip


def test_every_python_module_says_what_it_guarantees() -> None:
    """A module without a docstring has no reader."""
    silent = [path for path in sources.python_files() if not ast.get_docstring(sources.tree(path))]
    assert [sources.relative(path) for path in silent] == []


def test_every_rust_file_says_what_it_guarantees() -> None:
    """The same in Rust."""
    silent = [path for path in sources.rust_files() if not path.read_text().startswith("//!")]
    assert [sources.relative(path) for path in silent] == []


def test_functions_are_short() -> None:
    """Seventy lines fit on a screen."""
    functions = [
        function for path in sources.python_files() for function in sources.python_functions(path)
    ] + [function for path in sources.rust_files() for function in sources.rust_functions(path)]
    assert len(functions) > 100, "the functions were not found"
    _compare(
        {function.place for function in functions if function.lines > LINES_OF_FUNCTION_MAX},
        LONG_FUNCTIONS,
    )


def test_files_are_short() -> None:
    """A file that is longer holds two things."""
    files = sources.python_files() + sources.rust_files()
    _compare(
        {
            sources.relative(path)
            for path in files
            if len(path.read_text().splitlines()) > LINES_OF_FILE_MAX
        },
        LONG_FILES,
    )


def test_lines_are_short() -> None:
    """A hundred columns; prose in Markdown flows as it likes."""
    files = [path for path in sources.texts() if path.suffix in {".py", ".pyi", ".rs", ".sh"}]
    long = [
        f"{sources.relative(path)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > COLUMNS_MAX
    ]
    assert long == []


@pytest.mark.parametrize(
    "banned", [_UNFINISHED, _SKIPPED, _MACHINE_PATHS], ids=["unfinished", "skipped", "paths"]
)
def test_nothing_says(banned: re.Pattern[str]) -> None:
    """No unfinished work, no test that is left out, no path of one machine."""
    assert _lines_with(banned) == []


def test_no_registry_is_named() -> None:
    """Where packages come from is the machine's configuration. (Cargo writes its own lock.)"""
    assert [line for line in _lines_with(_HOSTS) if not line.startswith("Cargo.lock")] == []


def test_no_error_is_swallowed() -> None:
    """`except Exception: pass` hides what nobody thought of."""
    swallowed = [
        f"{sources.relative(path)}:{node.lineno}"
        for path in sources.python_files()
        for node in ast.walk(sources.tree(path))
        if isinstance(node, ast.ExceptHandler) and _is_broad(node) and _does_nothing(node)
    ]
    assert swallowed == []


def test_every_error_has_its_own_code() -> None:
    """Programs match on the code."""
    codes = [error.code for error in errors.all_errors()]
    assert sorted(codes) == sorted(set(codes))


def test_every_error_is_raised_somewhere() -> None:
    """An error that nothing raises is a promise that nothing keeps."""
    made = {name for name, _ in _errors_made()}
    classes = {error.__name__ for error in errors.all_errors()}
    _compare(classes - made, NOT_RAISED)


def test_every_error_gets_the_fields_of_its_message() -> None:
    """A message never reads '?'."""
    classes = {error.__name__: error for error in errors.all_errors()}
    lacking = []
    for name, call in _errors_made():
        given = {keyword.arg for keyword in call.keywords}
        if None in given:
            continue
        wanted = _fields(classes[name])
        if missing := wanted - {field for field in given if field}:
            lacking.append(f"{name} at line {call.lineno} lacks {sorted(missing)}")
    assert lacking == []


def test_every_error_says_what_to_do() -> None:
    """What happened and to what is the message; the hint is what to do about it."""
    assert [error.__name__ for error in errors.all_errors() if not error.hint] == []


def test_the_table_of_errors_is_the_classes() -> None:
    """docs/errors.md is made by tools/errors_table.py."""
    assert (sources.ROOT / "docs/errors.md").read_text() == table()


def _compare(found: set[str], ratchet: tuple[str, ...]) -> None:
    assert found - set(ratchet) == set(), "these break the rule"
    assert set(ratchet) - found == set(), "these keep it now: take them out of the ratchet"


def _lines_with(banned: re.Pattern[str]) -> list[str]:
    return [
        f"{sources.relative(path)}:{number}: {line.strip()[:80]}"
        for path in sources.texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if banned.search(line)
    ]


def _is_broad(handler: ast.ExceptHandler) -> bool:
    kind = handler.type
    return kind is None or (
        isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}
    )


def _does_nothing(handler: ast.ExceptHandler) -> bool:
    return all(
        isinstance(line, ast.Pass | ast.Continue)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in handler.body
    )


def _errors_made() -> list[tuple[str, ast.Call]]:
    """Every place in the package that makes an error, by the name of its class."""
    classes = {error.__name__ for error in errors.all_errors()}
    found = []
    for path in sources.package_files():
        if path.name == "errors.py" and path.parent.name == "diapause":
            continue
        for node in ast.walk(sources.tree(path)):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in classes:
                found.append((name, node))
    return found


def _fields(error: type[errors.DiapauseError]) -> set[str]:
    template = (error.__doc__ or "").split("\n\n")[0] + error.hint
    return set(re.findall(r"\{(\w+)", template))
