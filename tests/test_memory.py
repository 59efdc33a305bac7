"""What counts as free memory: the page cache does, what a control group forbids does not."""

import os

import pytest

from jft import memory

GB = 2**30


@pytest.fixture
def root(tmp_path):
    """A machine of 16 GB, 1 GB of it unused, 11 GB page cache."""
    (tmp_path / "proc/self").mkdir(parents=True)
    info = f"MemTotal: {16 * GB // 1024} kB\nMemFree: {GB // 1024} kB\nMemAvailable: {12 * GB // 1024} kB\n"
    (tmp_path / "proc/meminfo").write_text(info)
    return tmp_path


def group(root, version, path, limit, used, cache):
    mount, *names, key = memory.VERSIONS[version]
    folder = root / mount / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{key} {cache}\n")


def test_the_page_cache_is_free(root):
    assert memory.available(root) == 12 * GB


def test_a_group_without_a_limit_changes_nothing(root):
    (root / "proc/self/cgroup").write_text("4:memory:/\n0::/user\n")
    group(root, 2, "user", "max", GB, 0)
    group(root, 1, "", 9223372036854771712, GB, 0)
    assert memory.available(root) == 12 * GB


@pytest.mark.parametrize(("version", "line"), [(1, "4:cpu,memory:/slurm/job_7/step_0"), (2, "0::/slurm/job_7/step_0")])
def test_the_smallest_limit_above_a_process_holds_and_its_cache_is_free(root, version, line):
    (root / "proc/self/cgroup").write_text(f"1:cpuset:/\n{line}\n")
    unlimited = "max" if version == 2 else 2**62
    group(root, version, "slurm/job_7/step_0", unlimited, GB, 0)
    group(root, version, "slurm/job_7", 4 * GB, 3 * GB, 2 * GB)
    group(root, version, "slurm", 14 * GB, GB, 0)
    assert memory.available(root) == 3 * GB


def test_a_containers_own_group_is_the_mounts_root(root):
    (root / "proc/self/cgroup").write_text("4:memory:/docker/0a1b\n")
    group(root, 1, "", 2 * GB, GB, 0)
    assert memory.available(root) == GB
    group(root, 1, "", 2 * GB, 3 * GB, 0)
    assert memory.available(root) == 0


def test_without_proc_half_of_the_memory_is_free(tmp_path, monkeypatch):
    names = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}  # all that macOS has of these
    monkeypatch.setattr(os, "sysconf", lambda name: names[name])
    assert memory.available(tmp_path) == 2 * GB


def test_a_run_asks_for_it(monkeypatch):
    from jft import build

    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError("unrecognized name")))
    assert build.memory_free() > 0
