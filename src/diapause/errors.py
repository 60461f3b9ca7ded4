"""Every error that a person or a program can meet: one class each, one table.

The first line of a class's docstring is its message template; ``code`` is stable and is what
programs match on; ``exit_code`` is the command line's and ``status`` the API's. ``hint`` says what
to do.
Codes 10-19: what was named. 20-29: what was asked for. 30-39: the VMM. 40-49: stored data.
50-59: the guest. 60-69: the daemon and its home.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DiapauseError(Exception):
    """Diapause failed in a way that it has no better word for: {cause}."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    hint: ClassVar[str] = (
        "It is a defect: please report it with what `diapause support-bundle` packs."
    )

    def __init_subclass__(cls) -> None:
        if "hint" not in vars(cls):  # a class without advice gives none, least of all this one
            cls.hint = ""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The template of the class, filled in, on one line."""
        template = (type(self).__doc__ or "").split("\n\n")[0]
        return " ".join(template.format_map(_Fields(self.fields)).split())

    @property
    def advice(self) -> str:
        """What to do about it, or an empty string."""
        return self.hint.format_map(_Fields(self.fields))

    def to_dict(self) -> dict[str, Any]:
        """The error as the API and the catalog carry it."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.advice,
            "exit_code": self.exit_code,
            "fields": {name: _plain(value) for name, value in self.fields.items()},
        }


class _Fields(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return "?"


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


class InvalidRequest(DiapauseError):
    """{what} is not valid: {cause}."""

    code, exit_code, status = "invalid_request", 2, 400
    hint = "`diapause VERB --help` has every option, with examples; docs/api.md has the API."


class NotSupportedYet(DiapauseError):
    """{what} is part of the contract but this version does not do it yet."""

    code, exit_code, status = "not_supported", 2, 501
    hint = "Leave it out; docs/limitations.md lists what this version does not do."


class SandboxNotFound(DiapauseError):
    """There is no sandbox {reference!r}; there are: {candidates}."""

    code, exit_code, status = "sandbox_not_found", 10, 404
    hint = "`diapause ps -a` lists all of them."


class SnapshotNotFound(DiapauseError):
    """There is no snapshot {reference!r}; there are: {candidates}."""

    code, exit_code, status = "snapshot_not_found", 11, 404
    hint = "`diapause snapshot ls` lists all of them."


class ImageNotFound(DiapauseError):
    """There is no image {reference!r}; there are: {candidates}."""

    code, exit_code, status = "image_not_found", 12, 404
    hint = "`diapause image build {reference}` makes one, if it is a known flavour."


class AmbiguousReference(DiapauseError):
    """{reference!r} could be any of: {candidates}."""

    code, exit_code, status = "ambiguous_reference", 13, 409
    hint = "Write more of the id, or a name."


class NameInUse(DiapauseError):
    """The name {name!r} belongs to {owner} already."""

    code, exit_code, status = "name_in_use", 14, 409
    hint = "Choose another name, or remove its owner."


class WrongState(DiapauseError):
    """Sandbox {sandbox} is {state}; {verb} needs it {needed}."""

    code, exit_code, status = "wrong_state", 15, 409
    hint = "{advice}"


class Busy(DiapauseError):
    """Sandbox {sandbox} is busy: {cause}."""

    code, exit_code, status = "busy", 16, 409
    hint = "Try again; `diapause inspect {sandbox}` says what it is doing."


class PortUnavailable(DiapauseError):
    """Port {port} of the host's 127.0.0.1 can't be forwarded: {cause}."""

    code, exit_code, status = "port_unavailable", 17, 409
    hint = "Free it and try again, or fork the sandbox or its snapshot: a fork has no forwards."


class InUse(DiapauseError):
    """{what} is needed by {users}."""

    code, exit_code, status = "in_use", 18, 409
    hint = "{advice}"


class HomeBusy(DiapauseError):
    """Waited {waited_s:.0f} s for {verb} to let go of the home's shared files."""

    code, exit_code, status = "home_busy", 19, 409
    hint = "Try again when it is done."


class OperationNotFound(DiapauseError):
    """There is no operation {operation!r}."""

    code, exit_code, status = "operation_not_found", 29, 404
    hint = "An id has 16 hex digits; operations of long ago are forgotten."


class NotEnoughMemory(DiapauseError):
    """{what} needs {needed_bytes} bytes of memory; the host has {available_bytes} available."""

    code, exit_code, status = "not_enough_memory", 20, 409
    hint = "Ask for less with --memory, or pause a sandbox first."


class NotEnoughSpace(DiapauseError):
    """{what} needs {needed_bytes} bytes in {directory}; {available_bytes} are free."""

    code, exit_code, status = "not_enough_space", 21, 507
    hint = "Free some space there and try again; nothing was lost."


class HostExhausted(DiapauseError):
    """{what} failed: the host has no thread or process left for it."""

    code, exit_code, status = "host_exhausted", 23, 503
    hint = "Try again when less runs; `ulimit -u` and the daemon's cgroup bound their number."


class StorageFailed(DiapauseError):
    """Writing {what} failed: {cause}."""

    code, exit_code, status = "storage_failed", 22, 500
    hint = "Check the file system below the home."


class Cancelled(DiapauseError):
    """Operation {operation} ({verb}) was cancelled."""

    code, exit_code, status = "cancelled", 130, 409
    hint = "What it had done was put back."


class KeyReused(DiapauseError):
    """The idempotency key {key!r} belongs to another request."""

    code, exit_code, status = "key_reused", 24, 422
    hint = "Use a fresh key for each request, and the same one only to repeat it."


class VmmMissing(DiapauseError):
    """The VMM {program!r} is not installed."""

    code, exit_code, status = "vmm_missing", 30, 409
    hint = "Install it: apt-get install {package}"


class VmmTooOld(DiapauseError):
    """{program} is version {found}; Diapause needs {needed} or newer."""

    code, exit_code, status = "vmm_too_old", 31, 409
    hint = "Upgrade it: apt-get install {package}"


class VmmFailed(DiapauseError):
    """The VMM of sandbox {sandbox} failed at {step}: {cause}."""

    code, exit_code, status = "vmm_failed", 32, 500
    hint = "`diapause logs {sandbox}` and vmm.log in its directory say more."


class VmmTimeout(DiapauseError):
    """The VMM of sandbox {sandbox} did not finish {step} within {bound_s:.0f} s."""

    code, exit_code, status = "vmm_timeout", 33, 504
    hint = "Try again; if it goes on, vmm.log in the sandbox's directory may say why."


class SnapshotIncompatible(DiapauseError):
    """Snapshot {snapshot} needs {part} {needed!r}; this host has {found!r}."""

    code, exit_code, status = "snapshot_incompatible", 34, 409
    hint = "Resume it on a host that has it; nothing was started."


class CaptureFailed(DiapauseError):
    """Capturing sandbox {sandbox} failed at {step}: {cause}. The guest {guest}."""

    code, exit_code, status = "capture_failed", 35, 500
    hint = "Nothing of it is left: the same verb may be tried again once the cause is gone."


class ConfinementFailed(DiapauseError):
    """The VMM of sandbox {sandbox} could not be confined at {stage}: {cause}."""

    code, exit_code, status = "confinement_failed", 36, 500
    hint = "`diapause doctor` says what this host grants; nothing was left running."


class PagerUnavailable(DiapauseError):
    """Memory can't be served on demand: {cause}."""

    code, exit_code, status = "pager_unavailable", 43, 503
    hint = "`resume --memory-mode copy` does without; `diapause doctor` says what is missing."


class VmmUnusable(DiapauseError):
    """The VMM {program!r} could not be asked what it can do: {cause}."""

    code, exit_code, status = "vmm_unusable", 38, 500
    hint = "Try again; if it goes on, `{program} --version` by hand may say why."


class RestoreFailed(DiapauseError):
    """Restoring sandbox {sandbox} to snapshot {snapshot} failed: {cause} It is {state} now."""

    code, exit_code, status = "restore_failed", 37, 500
    hint = "What it was before is saved as: {saved}. `diapause restore {sandbox} {snapshot}` again."


class BlobDamaged(DiapauseError):
    """Blob {blob} is damaged: {cause}."""

    code, exit_code, status = "blob_damaged", 40, 500
    hint = "What needs it cannot be resumed until it is restored from another copy."


class BlobMissing(DiapauseError):
    """Blob {blob} is missing."""

    code, exit_code, status = "blob_missing", 41, 500
    hint = "What needs it cannot be resumed until it is restored from another copy."


class SnapshotLost(DiapauseError):
    """Snapshot {snapshot} is failed: {cause}."""

    code, exit_code, status = "snapshot_lost", 42, 409
    hint = "An older one may be whole: `diapause snapshot ls`."


class GuestLost(DiapauseError):
    """Sandbox {sandbox} is failed: {cause}. What it did since {since} is lost."""

    code, exit_code, status = "guest_lost", 44, 409
    hint = "{advice}"


class BenchFailed(DiapauseError):
    """Measuring {what} failed: {cause}."""

    code, exit_code, status = "bench_failed", 45, 500
    hint = "`diapause doctor` says what this host can do; nothing of the guests measured is left."


class ImageBuildFailed(DiapauseError):
    """Building image {image} failed at {step}: {cause}."""

    code, exit_code, status = "image_build_failed", 43, 500
    hint = "Nothing of it is left: build it again once the cause is gone."


class KernelRefused(DiapauseError):
    """{path} is no kernel that a guest can boot: {cause}."""

    code, exit_code, status = "kernel_refused", 70, 400
    hint = "Give a bzImage for x86-64, such as the /boot/vmlinuz-* of a distribution."


class InitrdRefused(DiapauseError):
    """{path} is no initial file system: {cause}."""

    code, exit_code, status = "initrd_refused", 71, 400
    hint = "Give what the kernel's own loader takes: a cpio archive (newc), plain or compressed."


class RootfsRefused(DiapauseError):
    """{path} can't become a root disk: {cause}."""

    code, exit_code, status = "rootfs_refused", 72, 400
    hint = "Give a directory, a tar (plain, gz, xz, zst, bz2), or an ext4 file system in a file."


class RootfsDamaged(DiapauseError):
    """The file system in {path} is damaged: {cause}."""

    code, exit_code, status = "rootfs_damaged", 73, 400
    hint = "Repair a copy of it with `e2fsck -f`, look at what was lost, and import the copy."


class RootfsArchiveRefused(DiapauseError):
    """The archive {path} was refused at {entry}: {cause}."""

    code, exit_code, status = "rootfs_archive_refused", 74, 400
    hint = "Nothing of it was kept. Pack it again with `tar -C DIR --xattrs -cf FILE .`"


class RootfsTooLarge(DiapauseError):
    """The root file system is too large: {cause}."""

    code, exit_code, status = "rootfs_too_large", 75, 413
    hint = "Leave out what a guest does not need; its disk can be grown by `run --disk`."


class AgentUnreachable(DiapauseError):
    """The agent in sandbox {sandbox} did not answer within {bound_s:.0f} s."""

    code, exit_code, status = "agent_unreachable", 50, 504
    hint = "`diapause logs {sandbox}` shows the guest's console."


class AgentRefused(DiapauseError):
    """The agent in sandbox {sandbox} refused {what}: {cause}."""

    code, exit_code, status = "agent_refused", 51, 502
    hint = "`diapause logs {sandbox}` shows the guest's console."


class ArchiveRefused(DiapauseError):
    """The copy was refused at {entry}: {cause}."""

    code, exit_code, status = "archive_refused", 52, 502
    hint = "Nothing of it was kept. A stream that no honest guest sends is refused whole."


class CopyFailed(DiapauseError):
    """Copying {what} failed: {cause}."""

    code, exit_code, status = "copy_failed", 53, 500
    hint = "Nothing of it was kept."


class AgentTooOld(DiapauseError):
    """The agent in sandbox {sandbox} does not know {what}: its snapshot is older than that."""

    code, exit_code, status = "agent_too_old", 54, 409
    hint = "Use `diapause exec` with tar, or run a new sandbox from an image built now."


class ExecCut(DiapauseError):
    """The command's stream was cut: {cause}."""

    code, exit_code, status = "exec_cut", 125, 502
    hint = "The command may go on in its guest; what it wrote until then was handed on."


class DaemonUnreachable(DiapauseError):
    """The daemon of {home} does not answer: {cause}."""

    code, exit_code, status = "daemon_unreachable", 60, 503
    hint = "See serve.log there, or run `diapause serve` to watch it."


class HomeNewer(DiapauseError):
    """The home {home} has catalog version {found}; this Diapause knows {known}."""

    code, exit_code, status = "home_newer", 61, 409
    hint = "Use a newer Diapause with it."


class HomeRefused(DiapauseError):
    """{home} is not reset: {cause}."""

    code, exit_code, status = "home_refused", 62, 409
    hint = "Nothing was removed. Another home is named with --home."


def all_errors() -> list[type[DiapauseError]]:
    """Every error class, the base first; the table in the docs is made from it."""
    found: list[type[DiapauseError]] = [DiapauseError]
    for error in found:
        found.extend(error.__subclasses__())
    return found


def from_dict(error: dict[str, Any]) -> DiapauseError:
    """The error that `to_dict` described, as its own class; the base class for an unknown code."""
    classes = {cls.code: cls for cls in all_errors()}
    cls = classes.get(str(error.get("code")), DiapauseError)
    fields = error.get("fields")
    if cls is DiapauseError or not isinstance(fields, dict):
        return DiapauseError(cause=str(error.get("message", "unknown")))
    return cls(**{str(name): value for name, value in fields.items()})
