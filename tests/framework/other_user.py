"""Running our own Python as a user without any privilege, whatever closes our files to it.

The interpreter, its packages and the repository may lie where only root can look (a home directory,
say). In a mount namespace of its own they are bound to a place that everybody can reach.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from tests.framework.sources import ROOT

NOBODY = 65534
_BIND = """
set -eu
for name in python site repo; do mkdir -p "$1/$name"; done
mount --bind "$2" "$1/python"; mount --bind "$3" "$1/site"; mount --bind "$4" "$1/repo"
place=$1 program=$5; shift 5
export HOME="$place" PYTHONPATH="$place/repo/src:$place/repo:$place/site" PYTHONDONTWRITEBYTECODE=1
cd "$place/repo"
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all \
  --no-new-privs "$place/python/$program" "$@"
"""


def python_as_nobody(place: Path, *arguments: str) -> list[str]:
    """The command; `place` is an empty directory that everybody can reach.

    Run by an ordinary user it is that user's own Python.
    """
    if os.geteuid() != 0:
        return [sys.executable, *arguments]
    program = Path(sys.executable).resolve().relative_to(sys.base_prefix)
    return [
        "unshare", "--mount", "sh", "-c", _BIND, "bind", str(place), sys.base_prefix,
        sysconfig.get_path("purelib"), str(ROOT), str(program), *arguments,
    ]  # fmt: skip
