"""The guests of these tests."""

from tests.framework.guest_fixtures import booted, daemon, guest

__all__ = ["booted", "daemon", "guest"]
