"""New sandboxes from an image, and sandboxes that go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diapause.errors import DiapauseError, SandboxNotFound
from diapause.guest import images
from diapause.model import RemoveAnswer, RunAnswer, RunRequest
from diapause.sandbox import accelerator, admit
from diapause.sandbox.host import row_identity
from diapause.sandbox.network import check_image, parse_forwards
from diapause.sandbox.part import Part
from diapause.sandbox.refer import find_sandbox
from diapause.sandbox.remove import Remove
from diapause.sandbox.resume import Boot
from diapause.sandbox.states import wrong_state

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord

_ALIVE = ("running", "frozen", "pausing", "resuming", "creating")


class Runs(Part):
    """`run` and `rm`."""

    def run(self, request: RunRequest) -> RunAnswer:
        """Make a sandbox from an image and boot it."""
        admit.check_run(self.catalog, request)
        image = images.find_image(self.host.home, request.image)
        check_image(request, image)
        self.host.driver.program()
        accelerated = accelerator.choose(self.host, image)
        record = self.new_record(request.name, request.image, request.memory_bytes, request.cpus)
        record.disks_bytes = [request.disk_bytes]
        record.net, record.ports = request.net, parse_forwards(request.ports)
        record.identity = row_identity(self.host.driver.identity(accelerated))
        with self.host.locks.hold(record.id):
            self.put_new(record)
            verb = Boot(self.host, record)
            verb.execute()
        return RunAnswer(
            sandbox=record.id, name=record.name, ready_ms=verb.elapsed_ms,
            phases_ms=verb.phases_ms, notes=verb.notes,
        )  # fmt: skip

    def remove(self, references: list[str], force: bool) -> RemoveAnswer:
        """Remove sandboxes; one that is gone already is a success that says so."""
        removed: list[str] = []
        already: list[str] = []
        for reference in references:
            try:
                record = find_sandbox(self.catalog, reference)
            except SandboxNotFound:
                if self.catalog.sandbox(reference) is None:
                    raise
                already.append(reference)
                continue
            self._remove_one(record, force)
            removed.append(record.id)
        return RemoveAnswer(removed=removed, already=already)

    def _remove_one(self, record: SandboxRecord, force: bool) -> None:
        with self.host.locks.hold(record.id):
            try:
                record = self.reread(record)
            except DiapauseError:
                if not force:
                    raise
                record = self.catalog.sandbox(record.id) or record  # its VMM is ended all the same
            if record.state == "removed":
                return
            if not force and record.state in _ALIVE:
                raise wrong_state(record, "rm", "paused, stopped or failed; or use `rm -f`")
            with self.host.reserve.room():
                Remove(self.host, record).execute()
