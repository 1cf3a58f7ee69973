"""How much memory this process may still take; no torch."""

from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take, 0 where the system does not say.

    That is Linux's own estimate, and no more than the container's limit leaves (version 2 of
    control groups; files that it holds in memory can be dropped and count as free).
    """
    system = _numbers(root / "proc/meminfo").get("MemAvailable:", 0) << 10
    group = root / "sys/fs/cgroup"
    limit, used = group / "memory.max", group / "memory.current"
    if not limit.is_file() or not used.is_file() or not limit.read_text().strip().isdigit():
        return system
    droppable = _numbers(group / "memory.stat").get("inactive_file", 0)
    return min(system, int(limit.read_text()) - int(used.read_text()) + droppable)


def _numbers(file: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    if not file.is_file():
        return {}
    words = (line.split() for line in file.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) > 1}
