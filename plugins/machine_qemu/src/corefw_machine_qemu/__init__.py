"""migfw's machine "qemu": a virtual machine that left a real QEMU and is parked here."""

from corefw_machine_qemu.parked import ParkedMachine

__all__ = ["ParkedMachine"]
