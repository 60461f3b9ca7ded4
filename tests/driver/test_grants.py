"""What a host grants, tried for real: as this user, as nobody, and where namespaces are used up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from diapause.driver.grants import LEVELS, grants
from tests.framework.other_user import python_as_nobody

_ASK = """
import dataclasses, json
from diapause.driver.grants import grants
given = grants()
print(json.dumps([given.level.user, given.level.namespaces, list(given.refused.values())]))
"""
# In a user namespace whose own limit on further ones is none.
_USED_UP = """
echo 0 >/proc/sys/user/max_user_namespaces
exec setpriv --inh-caps=-all --bounding-set=-all "$@"
"""


def asked(command: list[str]) -> tuple[str, bool, list[str]]:
    """What the daemon would find there: user, namespaces, and what refused more."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    user, namespaces, refused = json.loads(done.stdout)
    return user, namespaces, refused


def test_what_is_granted_comes_after_what_was_refused() -> None:
    """From the best down, and each that was refused with its cause."""
    given = grants()
    assert list(given.refused) == list(LEVELS[: LEVELS.index(given.level)])
    assert all(": " in cause for cause in given.refused.values())


def test_an_ordinary_user_gets_no_user_of_its_own() -> None:
    """A user namespace where the host allows one; or nothing, with the cause of that."""
    with tempfile.TemporaryDirectory(prefix="dia-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        user, namespaces, refused = asked(python_as_nobody(place, "-c", _ASK))
    assert (user, namespaces) in (("namespace", True), ("same", False))
    assert "only root can change users" in refused[0]
    assert namespaces or len(refused) == 3


def test_where_user_namespaces_are_used_up_it_goes_on_without() -> None:
    """Less is granted, and it says which call was refused."""
    inside = ["unshare", "--user", "--map-root-user", "sh", "-ec", _USED_UP, "sh"]
    user, namespaces, refused = asked([*inside, sys.executable, "-c", _ASK])
    assert (user, namespaces) == ("same", False)
    assert any("user-namespace" in cause for cause in refused)
