"""One image build: where it works, whom it tells, and how it fails.

What holds: a program that a build runs ends within its bound, cannot ask questions, and speaks in
the C locale; whatever goes wrong becomes one `ImageBuildFailed` that names the step.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import limits, operation
from diapause.errors import ImageBuildFailed

if TYPE_CHECKING:
    from collections.abc import Callable

_STDERR_SHOWN = 500


@dataclass(frozen=True)
class ImageBuild:
    """A build in progress: the image's name, a directory to work in, and who is told."""

    image: str
    directory: Path
    progress: Callable[[str], None]

    def failed(self, step: str, cause: object) -> ImageBuildFailed:
        """The error to raise."""
        return ImageBuildFailed(image=self.image, step=step, cause=cause)

    def run(
        self,
        step: str,
        *argv: str | Path,
        bound_s: float = limits.SUBPROCESS_S,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Run a program in the build's directory and return what it printed.

        A cancelled operation ends it: Cancelled.
        """
        done = self.call(step, *argv, bound_s=bound_s, environment=environment)
        if done.returncode != 0:
            raise self.failed(step, f"{Path(argv[0]).name}: {self.said(done)}")
        return done.stdout.decode(errors="replace")

    def said(self, done: subprocess.CompletedProcess[bytes]) -> str:
        """The end of what a program that failed complained of."""
        text = done.stderr.decode(errors="replace").strip()[-_STDERR_SHOWN:]
        return text or f"exit code {done.returncode}"

    def call(
        self,
        step: str,
        *argv: str | Path,
        bound_s: float = limits.SUBPROCESS_S,
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program to its end, whatever that is; a cancelled operation ends it: Cancelled."""
        operation.checkpoint()
        try:
            done = self._ended(argv, bound_s, environment or {})
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self.failed(step, error) from error
        operation.checkpoint()
        return done

    def _ended(
        self, argv: tuple[str | Path, ...], bound_s: float, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[bytes]:
        """The program's end: its own, at the bound, or when the operation is cancelled."""
        asked = operation.cancellable()
        process = subprocess.Popen(
            argv,
            cwd=self.directory,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process, asked.waking(process.kill) if asked else nullcontext():
            try:
                out, err = process.communicate(timeout=bound_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(argv, process.returncode, out, err)
