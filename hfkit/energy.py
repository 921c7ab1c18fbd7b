"""Energy of this machine's processors and GPUs, where they report it: an estimate, since power is sampled on GPUs.

Processors count joules themselves (Linux's powercap, often readable for root alone). Other machines of a run, memory,
fans and power supplies are not in it.
"""

import os
import time
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts from when it is made."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        zones = [zone for zone in powercap.glob("*:*") if zone.name.count(":") == 1]  # parts of a package have two
        self.packages = {zone: count for zone in zones if (count := read_count(zone)) is not None}
        self.read_at = time.monotonic()

    def read(self) -> float:
        """Return the joules since the last reading; 0 where nothing reports any."""
        now = time.monotonic()
        elapsed, self.read_at = now - self.read_at, now
        joules = gpu_watts() * elapsed
        for zone, before in self.packages.items():
            if (count := read_count(zone)) is not None:
                span = (read_count(zone, "max_energy_range_uj") or 0) if count < before else 0  # it began anew
                joules += (count + span - before) / 1e6
                self.packages[zone] = count
        return joules


def read_count(zone: Path, name: str = "energy_uj") -> int | None:
    """Return a counter of a powercap zone in microjoules; None where it may not be read."""
    try:
        return int((zone / name).read_text())
    except (OSError, ValueError):
        return None


def gpu_watts() -> float:
    """Return what the GPUs of this machine's processes draw, one each in order; 0 where one does not report it.

    hfkit[gpu] brings the library that asks the driver.
    """
    if not torch.cuda.is_initialized():  # trained on the processor, whatever GPUs there are
        return 0.0
    used = min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        return sum(torch.cuda.power_draw(index) for index in range(used)) / 1000
    except Exception:  # the drivers' libraries raise errors of many classes of their own: no estimate ends a run
        return 0.0
