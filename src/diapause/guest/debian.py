"""Debian's root file system in a directory, by mmdebstrap, from the host's own apt sources.

What holds: it runs in mount and process namespaces of its own and dies with us, so that a build
that is killed leaves no mount and no process on the host, only files in the home's `tmp/`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import limits
from diapause.guest.rootdisk import EPOCH

if TYPE_CHECKING:
    from diapause.guest.steps import ImageBuild

_STEP = "making the root file system"
_FIELDS = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(CODENAME)"
# What nobody reads in a sandbox, now or in packages installed later; licences stay.
_UNREAD = ("usr/share/man", "usr/share/locale", "usr/share/doc")
_DPKG_CONFIGURATION = (
    "".join(f"path-exclude=/{place}/*\n" for place in _UNREAD)
    + "path-include=/usr/share/doc/*/copyright\n"
)
# A process that belongs to nobody's namespaces but its own, and that ends with its parent.
_CONTAINED = (
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--mount", "--propagation", "private", "--pid", "--mount-proc", "--fork",
    "--kill-child",
)  # fmt: skip


def make_tree(build: ImageBuild, tree: Path, packages: tuple[str, ...]) -> None:
    """Fill `tree` with a minimal Debian and these packages."""
    if os.geteuid() != 0:
        raise build.failed(_STEP, "it needs root; build it as root and use it from then on")
    if shutil.which("mmdebstrap") is None:
        raise build.failed(_STEP, "mmdebstrap is missing; run `apt-get install mmdebstrap`")
    sources, codename = _sources(build)
    (build.directory / "sources.list").write_text("".join(f"{line}\n" for line in sources))
    build.progress(f"installing Debian {codename} with {', '.join(packages)}")
    build.run(
        _STEP, *_CONTAINED,
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory",
        f"--include={','.join(packages)}", "--dpkgopt=force-unsafe-io",
        '--aptopt=Acquire::Languages "none"',
        *(f"--aptopt={line}" for line in _proxies(build)),
        codename, tree, "sources.list",
        bound_s=limits.IMAGE_BUILD_S, environment={"SOURCE_DATE_EPOCH": EPOCH},
    )  # fmt: skip
    _drop_unread(tree)
    _same_for_all(tree)


def _drop_unread(tree: Path) -> None:
    """Afterwards: with path-exclude, mmdebstrap starts a filter for each of a hundred packages."""
    for place in _UNREAD:
        for directory, _, names in os.walk(tree / place):
            for name in names:
                if name != "copyright":
                    (Path(directory) / name).unlink()
    (tree / "etc/dpkg/dpkg.cfg.d/unread").write_text(_DPKG_CONFIGURATION)


def _sources(build: ImageBuild) -> tuple[list[str], str]:
    """The host's own Debian sources as lines of one list, and the release that they are of."""
    found = build.run(_STEP, "apt-get", "indextargets", "--format", _FIELDS, "Created-By: Packages")
    rows = [line.split("|") for line in found.splitlines() if line.startswith("Debian|")]
    if not rows:
        raise build.failed(_STEP, "apt knows no Debian source; run `apt-get update` as root")
    # Updates and security are named after the release, with a dash behind it.
    codename = min((row[4] for row in rows), key=len).split("-")[0]
    wanted = [row for row in rows if row[4].split("-")[0] == codename]
    return list(dict.fromkeys(f"deb {row[1]} {row[2]} {row[3]}" for row in wanted)), codename


def _proxies(build: ImageBuild) -> list[str]:
    """What the host's apt says of proxies: the sources may be behind one."""
    found = build.run(_STEP, "apt-config", "dump", "Acquire::http", "Acquire::https")
    return [line for line in found.splitlines() if "::Proxy" in line]


def _same_for_all(tree: Path) -> None:
    """Take out what is of this build or this host only."""
    for name in ("var/log/dpkg.log", "var/log/bootstrap.log", "var/log/alternatives.log"):
        (tree / name).unlink(missing_ok=True)
    (tree / "etc/machine-id").write_bytes(b"")
    (tree / "etc/resolv.conf").unlink(missing_ok=True)
