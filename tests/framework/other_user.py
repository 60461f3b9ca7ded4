"""Running our own Python as a user without any privilege, whatever closes our files to it.

The interpreter, its packages and the repository may lie where only root can look (a home directory,
say). In a mount namespace of its own they are bound to a place that everybody can reach, and
`/dev/fuse` is everybody's there, as udev makes it: without udev it is root's alone.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from diapause.store.home import Home
from tests.framework.sandbox import remove_closed
from tests.framework.sources import ROOT

NOBODY = 65534
_BIND = """
set -eu
for name in python site repo; do mkdir -p "$1/$name"; done
mkdir -p "$1/dev"; mount -t tmpfs -o mode=755 dev "$1/dev"
mknod -m 666 "$1/dev/fuse" c 10 229; mount --bind "$1/dev/fuse" /dev/fuse
mount --bind "$2" "$1/python"; mount --bind "$3" "$1/site"; mount --bind "$4" "$1/repo"
place=$1; shift 4
export HOME="$place" LD_LIBRARY_PATH="$place/python/lib"
export PYTHONPATH="$place/repo/src:$place/repo:$place/site" PYTHONDONTWRITEBYTECODE=1
cd "$place/repo"
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all \
  --no-new-privs "$@"
"""
# A user namespace whose own limit on further ones is none, and no right in it.
_USED_UP = """
echo 0 >/proc/sys/user/max_user_namespaces
exec setpriv --inh-caps=-all --ambient-caps=-all --bounding-set=-all "$@"
"""
WITHOUT_USER_NAMESPACES = (
    "unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-ec", _USED_UP, "sh",
)  # fmt: skip


def python_as_nobody(place: Path, *arguments: str, within: tuple[str, ...] = ()) -> list[str]:
    """The command; `place` is an empty directory that everybody can reach.

    Run by an ordinary user it is that user's own Python. `within` is what nobody runs it by.
    """
    if os.geteuid() != 0:
        return [*within, sys.executable, *arguments]
    program = Path(sys.executable).resolve().relative_to(sys.base_prefix)
    return [
        "unshare", "--mount", "sh", "-c", _BIND, "bind", str(place), sys.base_prefix,
        sysconfig.get_path("purelib"), str(ROOT), *within, str(place / "python" / program),
        *arguments,
    ]  # fmt: skip


def remove_what_nobody_left(home: Home) -> None:
    """A home that another user had, ended: its short-lived directories have that user's name."""
    for uid in {NOBODY, os.geteuid()}:
        for place in (home.sockets, home.buffers):
            remove_closed(place.with_name(place.name.replace(f"-{os.geteuid()}-", f"-{uid}-")))
