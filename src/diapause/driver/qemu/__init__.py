"""The QEMU driver: stock QEMU, a versioned q35 machine."""

from diapause.driver.qemu.driver import QemuDriver

__all__ = ["QemuDriver"]
