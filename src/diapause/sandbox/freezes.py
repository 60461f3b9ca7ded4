"""Guests that stand for a while with their memory where it is."""

from __future__ import annotations

from diapause.model import FreezeAnswer
from diapause.sandbox.freeze import Freeze, Thaw
from diapause.sandbox.part import Part
from diapause.sandbox.refer import find_sandbox
from diapause.sandbox.states import require


class Freezes(Part):
    """`freeze` and `thaw`."""

    def freeze(self, reference: str) -> FreezeAnswer:
        """Stop the vCPUs of a running guest."""
        return self._set(reference, Freeze, "running", "frozen")

    def thaw(self, reference: str) -> FreezeAnswer:
        """Let a frozen guest go on, with its clock set."""
        return self._set(reference, Thaw, "frozen", "running")

    def _set(
        self, reference: str, kind: type[Freeze | Thaw], before: str, after: str
    ) -> FreezeAnswer:
        found = find_sandbox(self.catalog, reference)
        with self.host.locks.hold(found.id):
            record = self.reread(found)
            if record.state == after:
                return FreezeAnswer(
                    sandbox=record.id, frozen=record.frozen, phases_ms={}, already=True
                )
            require(record, kind.name, before)
            verb = kind(self.host, record, self.guest(record))
            verb.execute()
        return FreezeAnswer(
            sandbox=record.id, frozen=record.frozen,
            phases_ms={**verb.phases_ms, "total": verb.elapsed_ms}, notes=verb.notes,
        )  # fmt: skip
