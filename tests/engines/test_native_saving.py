"""Checkpoints of the native engine while they are written: whole or not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from native_checkpoint_fixture import content, parameters, trained, write
from rank_processes import run_forked

from nxdt_align.engines.native.checkpoint import checkpoint_step
from nxdt_align.engines.native.saving import save
from nxdt_align.errors import UserError

REPO = Path(__file__).parents[2]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path)


def test_overwriting(written: Path) -> None:
    net, optimizer = trained(steps=5)
    save(written, parameters(net), optimizer, {"global_step": 5})
    assert checkpoint_step(written) == 5
    assert [p.name for p in written.parent.iterdir()] == [written.name]


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "writable"), (errno.EROFS, "read-only")],
)
def test_folder_that_cannot_be_written(
    written: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    before = content(written.parent)

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    net, optimizer = trained(steps=5)
    for target in (written, written.with_name("step=5")):
        for owner, call in ((os, "fsync"), (Path, "mkdir")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, call, fail)
                with pytest.raises(UserError, match=rf"cannot write checkpoint {target}: .*{advice}"):
                    save(target, parameters(net), optimizer, {"global_step": 5})
            assert content(written.parent) == before
    assert checkpoint_step(written) == 3


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from nxdt_align.engines.checkpoint_folder import CheckpointError
from nxdt_align.engines.native.saving import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
weight = nn.Parameter(torch.zeros(300_000))
try:
    save(Path(sys.argv[1]), [("weight", weight)], None, {"global_step": 9})
except CheckpointError as error:
    sys.exit(f"told: {error}")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs file size limits")
def test_write_that_really_fails_in_the_middle(written: Path) -> None:
    """The kernel refuses the bytes past a limit, as a full disk does."""
    before = content(written.parent)
    ended = run_forked(1, str(written), script=FILE_LIMIT)
    assert ended.statuses == [1]
    assert f"told: cannot write checkpoint {written}: a file is larger" in ended.said[0]
    assert content(written.parent) == before


KILLED = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from nxdt_align.engines.native import saving
def slow(*arguments):
    print("tensors written", flush=True)
    time.sleep(600)
saving._summary = slow
saving.save(Path(sys.argv[1]), [("weight", nn.Parameter(torch.zeros(10)))], None, {"global_step": 9})
"""


def test_sigkill_while_writing(written: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(written)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "tensors written\n"
    process.kill()
    process.wait()
    assert checkpoint_step(written) == 3
    others = [p for p in written.parent.iterdir() if p != written]
    assert len(others) == 1 and others[0].name.startswith(".")
    os.utime(others[0], (time.time() - 3600,) * 2)
    net, optimizer = trained()
    save(written.with_name("step=4"), parameters(net), optimizer, {"global_step": 4})
    assert sorted(p.name for p in written.parent.iterdir()) == ["step=3", "step=4"]


# Several ranks

RANK = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from nxdt_align.engines.native.checkpoint import load
from nxdt_align.engines.native.saving import save
from nxdt_align.engines.checkpoint_folder import CheckpointError
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", world_size=2, rank=rank)
named = [("weight", nn.Parameter(torch.arange(4.0)))]
try:
    save(folder / "bad", named, None, {"odd": object()})
except CheckpointError as error:
    assert "extra.odd" in str(error), error
else:
    sys.exit("no error")
save(folder / "good", named, None, {"global_step": 2})
fresh = [("weight", nn.Parameter(torch.zeros(4)))]
assert load(folder / "good", fresh, None) == {"global_step": 2} and fresh[0][1].equal(named[0][1])
dist.destroy_process_group()
"""


def test_two_ranks_write_one_and_fail_together(tmp_path: Path) -> None:
    run_forked(2, str(tmp_path), script=RANK).well()
    assert checkpoint_step(tmp_path / "good") == 2 and not (tmp_path / "bad").exists()
