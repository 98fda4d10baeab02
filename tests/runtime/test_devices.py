"""Free memory is what a container may take, not what its host has."""

import psutil
import pytest
import torch

from prunelight.runtime.devices import free_in_groups, free_memory

GB = 2**30
NO_LIMIT = 2**63 - 4096  # what version 1 says where there is none


def write(root, files):
    """Write a fake tree of files: path -> text or number."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{content}\n")


def group(directory, limit, usage, cache=0, version=2):
    """The files of one control group."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    top = "sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup"
    return {
        f"{top}/{directory}/{names[0]}": limit,
        f"{top}/{directory}/{names[1]}": usage,
        f"{top}/{directory}/memory.stat": f"anon 5\n{names[2]} {cache}\nother 7",
    }


TREES = {
    "a container of version 2": (
        {"proc/self/cgroup": "0::/", **group("", 2 * GB, GB, GB // 2)},
        GB + GB // 2,
    ),
    "a group of version 2 without a limit": (
        {"proc/self/cgroup": "0::/", **group("", "max", GB)},
        None,
    ),
    "a limit above the group": (
        {
            "proc/self/cgroup": "0::/slice/job",
            **group("slice/job", "max", GB),
            **group("slice", 3 * GB, 2 * GB),
        },
        GB,
    ),
    "the tightest of several limits": (
        {
            "proc/self/cgroup": "0::/slice/job",
            **group("slice/job", 5 * GB, 2 * GB),
            **group("slice", 3 * GB, 2 * GB),
        },
        GB,
    ),
    "a container of version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/\n0::/",
            **group("", 2 * GB, GB, GB // 4, version=1),
        },
        GB + GB // 4,
    ),
    "a path of the host, which a container of version 1 does not see": (
        {
            "proc/self/cgroup": "4:memory:/docker/0123abc",
            **group("", 2 * GB, GB, version=1),
        },
        GB,
    ),
    "version 1 without a limit": (
        {"proc/self/cgroup": "4:memory:/", **group("", NO_LIMIT, GB, version=1)},
        None,
    ),
    "more taken than allowed": ({"proc/self/cgroup": "0::/", **group("", GB, 2 * GB)}, 0),
    "no control groups": ({}, None),
    "no statistics": (
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": 2 * GB,
            "sys/fs/cgroup/memory.current": GB,
        },
        GB,
    ),
}


@pytest.mark.parametrize("title", TREES)
def test_the_limit_of_a_container_counts(title, tmp_path):
    files, expected = TREES[title]
    write(tmp_path, files)
    host = psutil.virtual_memory().available
    if expected is None:
        assert min([host, *free_in_groups(tmp_path)]) == host
        assert free_memory(torch.device("cpu"), tmp_path) == pytest.approx(host, rel=0.2)
    else:
        assert min(free_in_groups(tmp_path)) == expected
        assert free_memory(torch.device("cpu"), tmp_path) == min(expected, host)


def test_this_machine_can_be_asked():
    assert 0 <= free_memory(torch.device("cpu")) <= psutil.virtual_memory().total
