"""How much memory is free, for ``--kv-evict auto`` and ``--cache-ram``."""

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


def default_cache_ram() -> int:
    """MiB for checkpoints where nobody says how much: a quarter of the free memory, at most 8192."""
    return min(8192, (available_bytes() or 0) // 4 >> 20)


def gpu_bytes() -> int:
    """Free bytes of the GPUs that ``-ngl`` can put layers on, all together; 0 without one."""
    from edgekv._runtime import Ggml

    ggml = Ggml()
    return sum(ggml.memory(device)[0] for device in ggml.gpus())
