"""What a container may use: memory limit, memory in use and processor quota of control groups, version 1 and 2.

Every function takes the root folder, so that tests lay out a `/proc` and `/sys/fs/cgroup` of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of a page below 2^63; any limit above an exbibyte is none."""


@dataclass(frozen=True)
class MemoryLimit:
    """The limit of one group and what its processes hold, page cache that can be dropped not counted; in bytes."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


def memory_limits(root: Path) -> list[MemoryLimit]:
    """One entry for each group around this process that has a memory limit. Groups nest: the tightest counts."""
    groups = [*_folders(root, ""), *_folders(root, "memory")]
    return [limit for group in groups if (limit := _memory_limit(group))]


def cpu_quota(root: Path) -> float | None:
    """Processors' worth of time that the tightest group around this process gets; None without a quota."""
    quotas = [quota for group in _folders(root, "") if (quota := _quota_v2(group))]
    quotas += [quota for group in _folders(root, "cpu") if (quota := _quota_v1(group))]
    return min(quotas, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of all groups around it; `""` is version 2.

    In a container the path of `/proc/self/cgroup` may be the host's while the mounted folder is already the
    container's own. Such folders do not exist, and reading on upwards ends at the mounted one.
    """
    path = _group_path(root, controller)
    if path is None:
        return
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for mount in _mounts(root, controller):
        for length in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:length])
            if folder.is_dir():
                yield folder


def _group_path(root: Path, controller: str) -> str | None:
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        is_wanted = controller in controllers.split(",") if controller else number == "0"
        if is_wanted:
            return path
    return None


def _mounts(root: Path, controller: str) -> list[Path]:
    base = root / "sys/fs/cgroup"
    if not controller:
        return [base, base / "unified"]
    names = (controller, "cpu,cpuacct", "cpuacct,cpu") if controller == "cpu" else (controller,)
    # `cpu` is often a link to `cpu,cpuacct`: one of them is enough.
    return [base / name for name in names if (base / name).is_dir()][:1]


def _memory_limit(group: Path) -> MemoryLimit | None:
    v2 = [_number(group / name) for name in ("memory.max", "memory.high")]
    v1 = [_number(group / "memory.limit_in_bytes")]
    limits = [limit for limit in (*v2, *v1) if limit is not None and limit < UNLIMITED]
    if not limits:
        return None
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    return MemoryLimit(min(limits), max(0, used - _droppable(group)))


def _droppable(group: Path) -> int:
    """Page cache that the kernel gives back without asking: cached files not used of late."""
    figures = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    text = figures.get("total_inactive_file") or figures.get("inactive_file") or "0"
    return int(text) if text.strip().isdigit() else 0


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    quota, period = quota.strip(), period.strip()
    if not (quota.isdigit() and period.isdigit() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
