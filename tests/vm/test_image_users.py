"""Who needs an image, and what was kept to start it: shown, kept as long as it is needed, freed."""

from __future__ import annotations

import pytest

from diapause.errors import ImageNotFound, InUse
from diapause.guest.images import Image
from diapause.model import GcRequest
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Daemon, real_home

pytestmark = pytest.mark.vm


def ready(home: Daemon) -> list[str]:
    return [one.id for one in home.client.inspect_image("tiny").ready]


def gc(home: Daemon) -> list[str]:
    return home.client.gc(GcRequest()).snapshots


def test_an_image_stays_as_long_as_it_is_needed(tiny_image: Image) -> None:
    """A sandbox needs it, a snapshot does, and what was kept to start it doesn't."""
    with real_home(tiny_image) as home:
        web, _ = home.run_as_asked(name="web")
        found = home.client.inspect_image("tiny")
        assert {file.name for file in found.files} == {"kernel", "initrd"}
        assert (found.sandboxes, found.snapshots) == ([web.id], [])
        [kept] = ready(home)
        assert kept not in gc(home)
        assert ready(home) == [kept]
        web.rewrite()
        digests, saved = web.digests(), web.save("disk").snapshot
        home.packed(saved)
        assert home.client.df().gc_bytes > 0
        assert gc(home) == [kept]
        assert ready(home) == []
        for warm in (False, True):
            later, answer = home.run_as_asked()
            assert answer.warm == warm
            later.remove()
        with pytest.raises(InUse, match=rf"sandbox {web.id} \(web\) and snapshot {saved}"):
            home.client.remove_image("tiny")
        web.remove()
        with pytest.raises(InUse, match=rf"by snapshot {saved}"):
            home.client.remove_image("tiny")
        [fork] = home.fork(saved)
        assert fork.digests() == digests
        fork.remove()
        home.client.remove_snapshot(saved)
        assert home.client.remove_image("tiny").removed == ["tiny"]
        assert home.client.images() == []
        assert not list(home.home.tmp.iterdir())
        for verb in (home.client.remove_image, home.client.inspect_image):
            with pytest.raises(ImageNotFound):
                verb("tiny")
        with pytest.raises(ImageNotFound):
            home.run_as_asked()

        def collected() -> bool:
            gc(home)
            return not list(home.home.builds.iterdir())

        # gc keeps what somebody reads: digests of the fork's memory may still be made.
        eventually("the end of what was read", collected, WAIT_S)
        assert home.client.sandboxes(everything=True) == []
