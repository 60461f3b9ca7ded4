"""A daemon whose pager waits as long for a blob, and looks for builds there, as a test wants it.

`TEST_STALL_S`: what an access waits before its VMM is killed. `TEST_BLOBS_URL`: builds are read
over HTTP below it and not from the home, which no verb can ask for yet.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from diapause.cli.main import main
from diapause.pager import process
from diapause.snapshot.served import Served
from diapause.store.home import Home

_local = Served._spec  # the one place where builds get their medium


def served_command(home: Home) -> list[str]:
    """The command line of such a daemon."""
    return [
        sys.executable, "-P", str(Path(__file__)), "--home", str(home.root), "serve", "--detached",
    ]  # fmt: skip


def _remote(self: Served, *of: Any) -> dict[str, Any]:
    blobs = {"kind": "http", "url": os.environ["TEST_BLOBS_URL"]}
    return {**_local(self, *of), "blobs": blobs}


if __name__ == "__main__":
    if stall_s := os.environ.get("TEST_STALL_S"):
        process.PAGER_STALL_S = float(stall_s)  # type: ignore[attr-defined]
    if "TEST_BLOBS_URL" in os.environ:
        Served._spec = _remote  # type: ignore[method-assign,assignment]
    sys.exit(main(sys.argv[1:]))
