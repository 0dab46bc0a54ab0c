"""The command line, where rank 1's fourth step leaves a NaN behind in its last weight's part."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from nxdt_align.cli import main
from nxdt_align.training.strategy import EngineStrategy

optimizer_step = EngineStrategy.optimizer_step
done: list[int] = []


def spoiled(strategy: EngineStrategy, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    result = optimizer_step(strategy, optimizer, *args, **kwargs)
    done.append(1)
    if len(done) == 4 and os.environ["RANK"] == "1":
        parameter: Any = strategy.engine.named_parameters()[-1][1].detach()
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.view(-1)[0] = torch.nan
    return result


EngineStrategy.optimizer_step = spoiled  # type: ignore[method-assign]
sys.exit(main(sys.argv[1:]))
