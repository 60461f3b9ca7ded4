"""One image build: where it works, whom it tells, and how it fails.

What holds: a program that a build runs ends within its bound, cannot ask questions, and speaks in
the C locale; whatever goes wrong becomes one `ImageBuildFailed` that names the step.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import limits
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
        """Run a program in the build's directory and return what it printed."""
        try:
            done = subprocess.run(
                argv,
                cwd=self.directory,
                env={
                    **os.environ,
                    "LC_ALL": "C",
                    "DEBIAN_FRONTEND": "noninteractive",
                    **(environment or {}),
                },
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=bound_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self.failed(step, error) from error
        if done.returncode != 0:
            said = done.stderr.strip()[-_STDERR_SHOWN:] or f"exit code {done.returncode}"
            raise self.failed(step, f"{Path(argv[0]).name}: {said}")
        return done.stdout
