"""The accelerator, by proof: /dev/kvm may open, make VMs and vCPUs, and still not run a kernel.

A small guest is booted under KVM once, to an answering agent within a bound; the outcome is a fact
of this kernel, this CPU architecture and this QEMU. TCG needs no proof. A trial that never came to
the guest (a full disk, say) proves nothing: its run gets TCG, and the next one tries again.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.driver.base import BootFiles, DiskFiles, Shape, StartPlan
from diapause.driver.passing import is_passing
from diapause.errors import AgentUnreachable, Cancelled, DiapauseError, VmmFailed, VmmTimeout
from diapause.guest.images import ROOT_DISK
from diapause.sandbox.guests import Guest
from diapause.sandbox.start import host_tsc_khz
from diapause.sandbox.verb import new_id
from diapause.units import MIB

if TYPE_CHECKING:
    from diapause.driver.base import VmmIdentity
    from diapause.guest.images import Image
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.accelerator")
PROOF_BOUND_S = 15.0
_MEMORY_BYTES, _DISK_BYTES = 128 * MIB, 64 * MIB


def choose(host: Host, image: Image) -> str:
    """The accelerator of new sandboxes, proved now if it never was."""
    key = host.accelerator_key()
    known = host.catalog.fact(key)
    if known is None:
        works = _kvm_works(host, image)
        known = "kvm" if works else "tcg"
        if works is not None:
            host.catalog.remember(key, known)
    return known


def _kvm_works(host: Host, image: Image) -> bool | None:
    """None where the trial proved neither."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    try:
        _boot(host, image, host.driver.identity("kvm"))
    except Cancelled:
        raise
    except (VmmFailed, VmmTimeout, AgentUnreachable) as error:
        if not is_passing(error):
            log.warning("/dev/kvm is there and does not run a guest (%s); using TCG", error)
            return False
        log.warning("KVM could not be tried (%s); using TCG this time", error)
        return None
    except (DiapauseError, OSError) as error:
        log.warning("KVM could not be tried (%s); using TCG this time", error)
        return None
    return True


def _boot(host: Host, image: Image, identity: VmmIdentity) -> None:
    """Boot to an answering agent, and leave nothing."""
    name = new_id()
    with tempfile.TemporaryDirectory(dir=host.home.tmp) as scratch:
        overlay = Path(scratch) / "disk0.00000000.qcow2"
        base, disk_bytes = host.templates.disk(_DISK_BYTES), _DISK_BYTES
        if (digest := image.root_disk_digest) is not None:
            disk_bytes = image.manifest.files[ROOT_DISK].size
            base = host.templates.root_disk(digest, disk_bytes, image.root_disk)
        host.templates.overlay(disk_bytes, overlay)
        plan = StartPlan(
            sandbox=name, identity=identity, shape=Shape(_MEMORY_BYTES, 1, (disk_bytes,)),
            memory=host.templates.memory(_MEMORY_BYTES).flat,
            disks=(DiskFiles(base.flat, overlay),),
            console_log=Path(scratch) / "console.log", vmm_log=Path(scratch) / "vmm.log",
            boot=BootFiles(
                image.kernel, image.initrd,
                f"{image.manifest.command_line} tsc_early_khz={host_tsc_khz()}",
            ),
        )  # fmt: skip
        guest = Guest(name, host.loop)
        guest.machine = host.driver.start(plan)
        try:
            guest.machine.thaw()
            guest.greet(None, PROOF_BOUND_S)
        finally:
            guest.cut("the proof is over")
            guest.machine.kill()
