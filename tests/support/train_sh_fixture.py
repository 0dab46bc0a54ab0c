"""scripts/train.sh with a recorder in the interpreter's place."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Stands for python: answers "processes" and where the package is, and writes down every other call.
RECORDER = """#!{python}
import json, os, signal, sys, time
if sys.argv[1] == "-c":
    sys.exit(print({package!r}))
with open({calls!r}, "a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}) + "\\n")
if "processes" in sys.argv:
    if "--engine" in sys.argv:
        sys.exit(print(os.environ.get("FAKE_ENGINE", "nxd")))
    if os.environ.get("FAKE_CONFIG_ERROR"):
        sys.exit("error: trainer.devices must be positive")
    print(os.environ.get("FAKE_PROCESSES", "1"))
    sys.exit(0)
print("training on stdout", flush=True)
print("training on stderr", file=sys.stderr, flush=True)
if os.environ.get("FAKE_SLEEP"):
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: (print("asked to stop", flush=True), sys.exit(17)))
    print("ready", flush=True)
    time.sleep(600)
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""


def write_script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str
    calls: list[dict[str, Any]]

    @property
    def trained(self) -> list[str]:
        """Arguments of the call that starts training, which must be the last."""
        return list(self.calls[-1]["argv"])


class Trainer:
    """Runs train.sh from a folder of its own, with nothing of this process's environment but PATH."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.repo, self.folder = repo, folder
        self.script = str(repo / "examples" / "train.sh")
        self.calls = folder / "calls.jsonl"
        self.bin = folder / "bin"
        self.bin.mkdir()
        package = str(repo / "src" / "nxdt_align")
        recorder = RECORDER.format(python=sys.executable, calls=str(self.calls), package=package)
        self.python = write_script(self.bin / "recorder", recorder)
        self.cwd = folder / "work"
        self.cwd.mkdir()

    def environment(self, **variables: str) -> dict[str, str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "NXDT_ALIGN_PYTHON": str(self.python), **variables}

    def __call__(self, *arguments: str, **variables: str) -> Result:
        done = subprocess.run(
            [self.script, *arguments],
            cwd=self.cwd,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return Result(done.returncode, done.stdout, done.stderr, [json.loads(line) for line in lines])


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]
