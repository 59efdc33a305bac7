"""How much of the machine's memory this process can still have."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

# By version of control groups: where they are mounted, and their files and keys of the limit, of what is used, and of
# the page cache therein that is given back first.
VERSIONS = {
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}
UNKNOWN = 2**31  # bytes, where the system tells nothing


def available(root: Path = Path("/")) -> int:
    """Bytes that the machine can still give, or, where that is less, this process's control groups (Slurm, Docker).

    What the page cache holds counts as free, as the kernel gives it up when memory is asked for: what a run does must
    not depend on which files were read before it. Where there is no /proc it is half of the machine's memory.
    """
    return max(0, min([_machine(root), *_groups(root)]))


def _machine(root: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(AttributeError, ValueError, OSError):  # macOS has these names, Windows no sysconf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return UNKNOWN


def _groups(root: Path) -> Iterator[int]:
    """Bytes that are left of each limit: a group's own and those of all above it hold."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number != "0" and "memory" not in controllers.split(","):
            continue
        mount, limit, used, cache = VERSIONS[2 if number == "0" else 1]
        # In a container its own group is mounted as the root, and the path may be one of the host's: it is not there.
        group = PurePosixPath(path.lstrip("/"))
        for folder in (root / mount / p for p in (group, *group.parents)):
            with suppress(OSError, ValueError):  # "max" is no limit, and a group without this controller has no file
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(cache, 0))
