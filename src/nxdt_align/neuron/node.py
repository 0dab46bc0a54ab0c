"""What a node's system says that a run must not learn too late: whose disk it writes to, and whose ports it
needs. Texts of /proc in, sentences out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
RESERVED_PORTS = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
ROOT_PORT = 62182
"""Of the runtime's collectives, where NEURON_RT_ROOT_COMM_ID names no other (torch_xla, _internal/neuron)."""
MASTER_PORT = 41000
"""Of train.sh, as of NxD Training's; on one node the first of some."""
_SHARED = re.compile(
    r"nfs4?|lustre|efs|ceph|glusterfs|beegfs|gpfs|wekafs|cifs|smb3|9p|virtiofs|orangefs|pvfs2|afs"
    r"|fuse\.(?!overlayfs|fuse-overlayfs|lxcfs|ecryptfs).*"
)
"""Types of file systems that several nodes mount."""


@dataclass(frozen=True)
class Mount:
    point: str
    kind: str
    """Type of file system, such as lustre."""

    @property
    def is_shared(self) -> bool:
        return _SHARED.fullmatch(self.kind) is not None


def mount_of(folder: Path, mounts: str) -> Mount | None:
    """The mount that ``folder`` is on, out of a mountinfo file (proc_pid_mountinfo(5)); None where that lists
    none."""
    found: Mount | None = None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        # A later line is mounted over an earlier one.
        if folder.is_relative_to(point) and (found is None or len(point) >= len(found.point)):
            found = Mount(point, after.split(" ")[0])
    return found


def local_disk_notice(folder: Path, mounts: str, variables: Mapping[str, str]) -> str | None:
    """A notice where checkpoints in ``folder`` would be gone with this pod of Kubernetes, and other nodes not
    see them."""
    if "POD_UID" not in variables and "KUBERNETES_SERVICE_HOST" not in variables:
        return None
    mount = mount_of(folder, mounts)
    if mount is None or mount.is_shared:
        return None
    return (
        f"checkpoints go to {folder}, which is on this pod's own disk ({mount.kind} at {mount.point}): they "
        "are gone with the pod, unless that is a persistent volume, and other nodes do not see them; mount a "
        "shared file system (FSx for Lustre, EFS), and set exp_manager.exp_dir or "
        "exp_manager.explicit_log_dir to a folder on it"
    )


def needed_ports(variables: Mapping[str, str], nodes: int, processes: int) -> list[int]:
    """Ports that the first node has to have free: the processes' rendezvous (torchrun tells each which), and
    the runtime's collectives."""
    ports = []
    if nodes > 1 or processes > 1:
        given = variables.get("MASTER_PORT", "")
        ports.append(int(given) if given.isdecimal() else MASTER_PORT)
    if processes > 1:
        root = variables.get("NEURON_RT_ROOT_COMM_ID", "").rpartition(":")[2]
        ports.append(int(root) if root.isdecimal() else ROOT_PORT)
    return ports


def ports_notice(ports: Sequence[int], reserved: str, local: str) -> str | None:
    """A notice where another program's connection may take one of ``ports`` at any time.

    Args:
        reserved, local: contents of RESERVED_PORTS (ranges between commas) and LOCAL_PORTS (first and last).
    """
    bounds = [int(word) for word in local.split() if word.isdecimal()]
    if len(bounds) != 2:
        return None
    kept = [part.partition("-") for part in reserved.strip().split(",") if part]
    open_ports = [
        port
        for port in ports
        if bounds[0] <= port <= bounds[1]
        and not any(int(first) <= port <= int(last or first) for first, _, last in kept)
    ]
    if not open_ports:
        return None
    wanted = ",".join(filter(None, [reserved.strip(), *map(str, open_ports)]))
    which = " and ".join(map(str, open_ports))
    return (
        f"port {which}: this run needs it, and any connection of this node may be given it, as it is one of "
        f"{bounds[0]} to {bounds[1]} and not reserved; "
        f"sudo sysctl -w net.ipv4.ip_local_reserved_ports={wanted} keeps it free"
    )


def read_text(path: Path) -> str:
    """What a file of /proc holds; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
