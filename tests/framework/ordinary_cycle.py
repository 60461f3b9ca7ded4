"""The whole cycle of a sandbox through its daemon: a program that any user can run.

    python -m tests.framework.ordinary_cycle HOME FACTS

HOME is a home with the image `tiny`, FACTS what is known of the host, as JSON. A guest counts and
has a file in memory and one on the disk: through a save, a pause, a resume, the end of the daemon,
a capture by the next one, and in a fork. What inspect and doctor said goes to stdout, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import msgspec

from diapause.store.home import Home
from tests.framework.fake_home import eventually, gone
from tests.framework.processes import end_processes
from tests.framework.sandbox import Daemon, Sandbox, remove_closed, these_are_known


def confinement(sandbox: Sandbox) -> dict[str, Any]:
    """What inspect says of a sandbox that runs."""
    found = sandbox.inspect().confinement
    assert found is not None
    return msgspec.to_builtins(found)  # type: ignore[no-any-return]


def pauses_and_resumes(daemon: Daemon, guest: Sandbox) -> dict[str, Any]:
    """Nothing lost, nothing twice; how its memory came, and what was said of it."""
    before, digests = guest.counted(), guest.digests()
    paused = guest.pause("disk")
    assert guest.inspect().state == "paused"
    assert guest.inspect().confinement is None
    daemon.packed(paused.snapshot)
    answer = guest.resume()
    assert answer.warm
    guest.counts_beyond(before)
    assert guest.digests() == digests
    return {"mode": answer.memory_mode, "notes": answer.notes}


def main(home: Home) -> dict[str, Any]:
    """Take the cycle; what was said of it."""
    daemon = Daemon(home)
    guest = daemon.run()
    found: dict[str, Any] = {"uid": os.geteuid(), "booted": confinement(guest)}
    guest.start_counter()
    digests = guest.rewrite()
    assert guest.exec("sh", "-c", "exit 7").returncode == 7
    assert not guest.save().already
    found["resumes"] = [pauses_and_resumes(daemon, guest)]
    found["resumed"] = confinement(guest)
    # The next daemon is no ancestor of what the last one started, and captures it all the same.
    vmm = guest.vmm_pid
    daemon.kill()
    assert guest.vmm_pid == vmm
    found["resumes"].append(pauses_and_resumes(daemon, guest))
    [fork] = guest.fork()
    assert fork.digests() == digests
    found["forked"] = confinement(fork)
    found["doctor"] = {
        check.name: msgspec.to_builtins(check) for check in daemon.client.doctor().checks
    }
    vmms = [guest.vmm_pid, fork.vmm_pid]
    for sandbox in (fork, guest):
        sandbox.remove()
    eventually("the end of both VMMs", lambda: all(gone(pid) for pid in vmms))
    assert daemon.vmms() == []
    assert list(home.sandboxes.iterdir()) == []
    daemon.stop()
    return found


if __name__ == "__main__":
    place = Home.at(sys.argv[1]).create()
    these_are_known(json.loads(sys.argv[2]))
    try:
        print(json.dumps(main(place)))
    finally:
        end_processes(place)
        for directory in (place.sockets, place.buffers):
            remove_closed(directory)
