"""Time a file, in a process of its own: a page that can't be served ends the process that maps it.

`python -m diapause.sandbox.bench.probe` with one JSON document: `what` (`touch`, `read` or
`digest`), `path`, and the arguments of that. Prints one JSON document.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from diapause import _core


def answer(what: str, path: str, **more: Any) -> Any:
    """Microseconds by offset; milliseconds; BLAKE3 in hex. Raises OSError."""
    if what == "touch":
        return _core.time_touches(path, **more)
    if what == "read":
        return _core.time_reading(path, **more)
    return _core.blake3_file(path)


if __name__ == "__main__":
    print(json.dumps(answer(**json.loads(sys.argv[1]))))
