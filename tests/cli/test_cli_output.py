"""What reaches a terminal, and what a run of the program pays for."""

from __future__ import annotations

import subprocess
import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from diapause.cli.output import printable
from tests.framework.fake_home import FakeHome

HEAVY = {
    "asyncio", "anyio", "rich", "sqlite3", "starlette", "subprocess",
    "uvicorn", "websockets", "diapause.sandbox", "diapause._core",
}  # fmt: skip


@given(st.text())
def test_nothing_that_controls_a_terminal_passes(text: str) -> None:
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert shown.encode().decode() == shown


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"])))
def test_ordinary_text_passes_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_what_is_kept_is_kept() -> None:
    assert printable("a\tb\n\x1b[0m\u202e", keep="\n\t") == "a\tb\n\\x1b[0m\\u202e"


def test_the_hot_path_imports_nothing_heavy(place: FakeHome) -> None:
    place.client.sandboxes()
    program = (
        "import sys; from diapause.cli.main import main;"
        f"code = main(['--home', {str(place.home.root)!r}, 'ps', '--json']);"
        "print(*sys.modules, sep='\\n', file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"[]\n")
    assert not HEAVY & set(done.stderr.decode().split())
