"""What a build runs: bounded, told apart by its step, and ended when nobody wants the build."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from diapause.errors import Cancelled, ImageBuildFailed
from diapause.guest.build import build_image
from diapause.guest.steps import ImageBuild
from diapause.operation import Operation, under
from diapause.store.home import Home
from tests.framework.fake_home import eventually, gone

_HELD = "#!/bin/sh\necho $$ >{pid}\nexec sleep 600\n"


@pytest.fixture
def build(tmp_path: Path) -> ImageBuild:
    return ImageBuild("tiny", tmp_path, lambda line: None)


def test_a_program_that_fails_is_named_with_its_step_and_words(build: ImageBuild) -> None:
    with pytest.raises(ImageBuildFailed, match="baking: sh: no flour"):
        build.run("baking", "sh", "-c", "echo no flour >&2; exit 3")


def test_a_program_that_takes_too_long_is_ended(build: ImageBuild) -> None:
    began = time.monotonic()
    with pytest.raises(ImageBuildFailed, match="baking"):
        build.run("baking", "sleep", "600", bound_s=0.1)
    assert time.monotonic() < began + 60


def test_nothing_is_begun_for_a_cancelled_build(build: ImageBuild, tmp_path: Path) -> None:
    asked = Operation("image build")
    asked.cancel()
    with under(asked), pytest.raises(Cancelled):
        build.run("baking", "touch", "begun")
    assert not (tmp_path / "begun").exists()


def test_a_build_that_is_cancelled_ends_its_program_and_leaves_nothing(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.create()
    pid_file = tmp_path / "pid"
    held = tmp_path / "apt-cache"
    held.write_text(_HELD.format(pid=pid_file))
    held.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    asked, said, outcome = Operation("image build"), list[str](), list[BaseException]()

    def work() -> None:
        with under(asked):
            try:
                build_image(home, "tiny", "tiny", said.append)
            except Cancelled as error:
                outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    eventually("the program", lambda: pid_file.exists() and pid_file.read_text().strip(), 60)
    asked.cancel()
    thread.join(60)
    assert [type(error) for error in outcome] == [Cancelled]
    assert gone(int(pid_file.read_text()))
    assert list(home.tmp.iterdir()) == []
    assert list(home.images.iterdir()) == []
