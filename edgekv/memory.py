"""How much memory is free, for ``--kv-evict auto``."""

from __future__ import annotations

import os


def available_bytes() -> int | None:
    """Bytes that can be taken without swapping, None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        # macOS does not tell what is reclaimable: leave a quarter to the system
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    except (ValueError, OSError, AttributeError):
        return None
