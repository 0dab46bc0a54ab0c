"""One archive of what is needed to find out, elsewhere, why a run on a Neuron node failed.

Versions, the stack's environment, what the Neuron tools say, the node's limits, and a run's own files: its
settings, the tails of its logs, the manifests of its graphs. No weights, no data, nothing that looks secret.
"""

from __future__ import annotations

import io
import json
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from threading import Timer

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write
from nxdt_align.neuron import node
from nxdt_align.neuron.environment import RELATED
from nxdt_align.redaction import hide, looks_secret, redact, scrub

PACKAGES = (
    *("nxdt-align", "torch", "torch-xla", "torch-neuronx", "neuronx-cc", "neuronx-distributed"),
    *("libneuronxla", "nki", "lightning", "pytorch-lightning", "nemo_toolkit", "transformers", "numpy"),
    *("omegaconf", "hydra-core", "safetensors", "boto3", "botocore", "requests", "protobuf"),
)
TAIL = 200_000
"""Bytes of a log's end."""
SECONDS = 20
"""That a tool may take."""
_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "MASTER_", "TORCHELASTIC_", "SLURM_"),
    *("OMPI_", "PMIX_", "POD_", "OMP_", "PYTHONPATH", "LD_LIBRARY_PATH", "PATH", "VIRTUAL_ENV", "COMPILE"),
    *("CONF_FILE", "TRAIN_ITERS", "NXDT_ALIGN_", "TORCH_", "BUCKET_CAP_MB", "HYDRA_"),
)
"""Beginnings of the names of variables that launchers set, beside those of the stack."""
_FILES = ("*.yaml", "*.json", "*.log", "*.txt")
"""Of a run's folder; the folder itself alone."""
_SYSTEM = {
    "limits.txt": Path("/proc/self/limits"),
    "mountinfo.txt": node.MOUNTS,
    "meminfo.txt": Path("/proc/meminfo"),
    "reserved_ports.txt": node.RESERVED_PORTS,
    "port_range.txt": node.LOCAL_PORTS,
    "driver.txt": Path("/sys/module/neuron/version"),
}
_TOOLS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "neuron-ls.json": (("neuron-ls", "--json-output"), None),
    "neuron-monitor.json": (("neuron-monitor",), 1),
    "neuronx-cc.txt": (("neuronx-cc", "--version"), None),
    "packages.txt": ((sys.executable, "-m", "pip", "list", "--format=freeze"), None),
    "kernel.txt": (("uname", "-a"), None),
}
"""File of the archive -> command, and the lines after which one that never ends is stopped."""


@dataclass(frozen=True)
class Part:
    """A file of the archive."""

    name: str
    text: str


def collect(
    variables: Mapping[str, str],
    *,
    runs: Sequence[Path] = (),
    files: Sequence[Path] = (),
    made: Mapping[str, Callable[[], str]] | None = None,
) -> list[Part]:
    """The archive's files, without the values of secret variables and what looks like a token.

    Args:
        variables: this process's environment.
        runs: folders of runs.
        files: further logs and manifests.
        made: file -> what makes its text; what that raises is the text where it fails.
    """
    for name, value in variables.items():
        if looks_secret(name):
            hide(value, f"<{name}>")
    parts = [
        Part("versions.json", json.dumps(versions(), indent=2)),
        Part("environment.txt", "\n".join(_environment(variables))),
        *(Part(f"node/{name}", node.read_text(path)) for name, path in _SYSTEM.items()),
        *(Part(f"node/{name}", _output(*tool)) for name, tool in _TOOLS.items()),
        *(Part(name, _attempt(make)) for name, make in (made or {}).items()),
        *(Part(f"runs/{run.name}/{file.name}", _tail(file)) for run in runs for file in _of_run(run)),
        *(Part(f"files/{number}_{file.name}", _tail(file)) for number, file in enumerate(files)),
    ]
    return [Part(part.name, scrub(redact(part.text))) for part in parts if part.text]


def write(path: Path, parts: Sequence[Part]) -> None:
    """Write the archive, a gzipped tar. Raises OSError; ``path`` is then as it was before."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for part in parts:
            data = part.text.encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"{path.name.partition('.')[0]}/{part.name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o644
            archive.addfile(entry, io.BytesIO(data))
    atomic_write(path, content.getvalue())


def versions() -> dict[str, str | None]:
    """Package or system -> version; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _environment(variables: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(variables):
        if name.startswith((*RELATED, *_LAUNCHERS)):
            yield f"{name}={f'<{name}>' if looks_secret(name) else variables[name]}"


def _of_run(folder: Path) -> list[Path]:
    return sorted(file for pattern in _FILES for file in folder.glob(pattern) if file.is_file())


def _tail(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - TAIL))
            text = opened.read().decode("utf-8", "replace")
    except OSError as error:
        return f"not read: {error}\n"
    return text if size <= TAIL else f"[the last {TAIL:,} of {size:,} bytes]\n{text}"


def _attempt(make: Callable[[], str]) -> str:
    """What goes wrong here is why the archive is asked for."""
    try:
        return make()
    except (UserError, OSError, ValueError, RuntimeError, ImportError) as error:
        return f"{type(error).__name__}: {error}\n"


def _output(command: tuple[str, ...], lines: int | None) -> str:
    """What a tool prints, or why it printed nothing."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}\n"
    with process:
        if lines is not None:
            return _first_lines(process, lines)
        try:
            text, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            return f"{text}\n[stopped after {SECONDS} seconds]\n"
    return text if not process.returncode else f"{text}\n[status {process.returncode}]\n"


def _first_lines(process: subprocess.Popen[str], lines: int) -> str:
    watch = Timer(SECONDS, process.kill)
    watch.start()
    try:
        assert process.stdout is not None
        return "".join(line for line, _ in zip(process.stdout, range(lines), strict=False))
    finally:
        watch.cancel()
        process.kill()
