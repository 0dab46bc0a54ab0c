"""A Lightning accelerator for devices that Lightning does not know: the engine has set its device up."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator


class EngineAccelerator(Accelerator):
    """Leaves everything about devices to the engine; ``trainer.devices`` counts processes."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Not asked: the strategy brings the engine's device."""
        raise NotImplementedError

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True
