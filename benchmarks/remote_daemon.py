"""A daemon whose pager fetches builds over HTTP: what no verb of the command line names yet.

python -m benchmarks.remote_daemon URL WORDS...     WORDS are those of `diapause`
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from diapause.cli.main import main
from diapause.snapshot.served import Served

if TYPE_CHECKING:
    from diapause.snapshot.headers import DeviceHeader

_spec = Served._spec


def _serve_from(url: str) -> None:
    def spec(self: Served, name: str, header: DeviceHeader, size_bytes: int) -> dict[str, Any]:
        found = _spec(self, name, header, size_bytes)
        return {**found, "blobs": {"kind": "http", "url": url}}

    Served._spec = spec  # type: ignore[method-assign]


if __name__ == "__main__":
    _serve_from(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
