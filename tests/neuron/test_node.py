"""Whose disk checkpoints go to, and whose ports a run needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxdt_align.neuron.node import local_disk_notice, mount_of, needed_ports, ports_notice

MOUNTS = r"""
2166 1713 0:383 / / rw,relatime master:641 - overlay overlay rw,lowerdir=/a:/b
2168 2166 0:387 / /dev rw,nosuid - tmpfs tmpfs rw
2170 2166 259:1 /var/lib/kubelet/pods/7/scratch /scratch rw - xfs /dev/nvme0n1p1 rw
2171 2166 0:52 / /fsx rw,relatime shared:9 - lustre 10.0.0.1@tcp:/abc rw,flock
2172 2166 0:53 / /shared rw,relatime - nfs4 127.0.0.1:/ rw,vers=4.1
2173 2166 0:54 / /bucket rw - fuse.mountpoint-s3 mountpoint-s3 rw
2174 2171 0:55 / /fsx/my\040tmp rw - tmpfs tmpfs rw
2175 2166 0:56 / /overlaid rw - fuse.fuse-overlayfs fuse-overlayfs rw
"""
POD = {"POD_UID": "7"}


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/nemo_experiments/llama", "overlay"),
        ("/scratch/runs", "xfs"),
        ("/fsx/my tmp/runs", "tmpfs"),
        ("/fsx2", "overlay"),
        ("/overlaid", "fuse.fuse-overlayfs"),
    ],
)
def test_a_pods_own_disk_is_named(folder: str, kind: str) -> None:
    said = local_disk_notice(Path(folder), MOUNTS, POD)
    assert said is not None and f"checkpoints go to {folder}, " in said and f"({kind} at " in said
    assert "exp_manager.exp_dir or exp_manager.explicit_log_dir" in said
    # Not in a pod: a node's disk is the user's own affair.
    assert local_disk_notice(Path(folder), MOUNTS, {}) is None


@pytest.mark.parametrize("folder", ["/fsx", "/fsx/runs", "/shared/nemo_experiments/7", "/bucket/runs"])
def test_a_shared_file_system_is_no_news(folder: str) -> None:
    assert local_disk_notice(Path(folder), MOUNTS, POD) is None


def test_what_is_mounted_last_counts_and_nothing_is_guessed() -> None:
    over = MOUNTS + "2180 2166 0:60 / /scratch rw - lustre 10.0.0.1@tcp:/abc rw\n"
    found = mount_of(Path("/scratch/runs"), over)
    assert found is not None and found.kind == "lustre"
    assert mount_of(Path("/scratch"), "nonsense\n") is None
    assert local_disk_notice(Path("/scratch"), "", POD) is None


def test_the_ports_that_a_run_needs() -> None:
    assert needed_ports({}, nodes=1, processes=1) == []
    assert needed_ports({}, nodes=1, processes=32) == [41000, 62182]
    given = {"MASTER_PORT": "29500", "NEURON_RT_ROOT_COMM_ID": "[fe80::1]:48620"}
    assert needed_ports(given, nodes=4, processes=128) == [29500, 48620]
    assert needed_ports({}, nodes=2, processes=64) == [41000, 62182]


@pytest.mark.parametrize(
    ("reserved", "local", "wanted"),
    [
        ("\n", "32768\t60999\n", "41000"),
        ("8000-8010", "32768 60999", "8000-8010,41000"),
        ("8000", "1024 65535", "8000,41000,62182"),
        ("62182", "1024 65535", "62182,41000"),
    ],
)
def test_a_port_that_others_may_be_given_is_named(reserved: str, local: str, wanted: str) -> None:
    said = ports_notice([41000, 62182], reserved, local)
    assert said is not None and f"ip_local_reserved_ports={wanted} keeps" in said


@pytest.mark.parametrize(
    ("reserved", "local"),
    [("41000", "32768 60999"), ("40000-42000", "32768 60999"), ("", "42000 60999"), ("", "")],
)
def test_a_port_that_is_kept_free_is_no_news(reserved: str, local: str) -> None:
    assert ports_notice([41000, 62182], reserved, local) is None
