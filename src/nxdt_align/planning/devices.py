"""What Trainium's cores can do, on paper: the constants of every estimate of time; and cards' rates.

Sources, AWS's architecture pages (aws-neuron-sdk, ``about-neuron/arch/neuron-hardware``): trn1-arch,
trainium, trn2-arch, and trainium2, which compares both chips, also their links. A rank is a logical
NeuronCore, which of trn2 is two physical ones (``LNC=2``, the default) or one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GIB = 2**30
TERA, GIGA = 10**12, 10**9
DEFAULT_LNC = 2
"""Physical cores of trn2 and trn3 that are one device where ``trainer.lnc`` says nothing."""


@dataclass(frozen=True)
class Device:
    """A rank's share of a chip, and of what joins it to others."""

    name: str
    cores_per_node: int
    memory: int
    """Bytes."""
    flops: float
    """Of products in bf16, per second."""
    float32_flops: float
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second that a rank sends while it receives as many, within a node."""
    network_bandwidth: float
    """The same between nodes."""
    physical_cores: int = 1
    """That the rank is made of."""

    @classmethod
    def of_chip(
        cls,
        name: str,
        cores: int,
        cores_per_node: int,
        *,
        memory: int,
        tflops: float,
        float32_tflops: float,
        memory_gbytes: float,
        link_gbytes: float,
        network_gbits: float,
        physical_cores: int = 1,
    ) -> Device:
        """From a chip's figures, shared evenly among its ``cores``, and the node's network. A link's figure
        is taken to count both directions."""
        return cls(
            name=name,
            cores_per_node=cores_per_node,
            memory=memory // cores,
            flops=tflops * TERA / cores,
            float32_flops=float32_tflops * TERA / cores,
            memory_bandwidth=memory_gbytes * GIGA / cores,
            link_bandwidth=link_gbytes * GIGA / 2 / cores,
            network_bandwidth=network_gbits * GIGA / 8 / cores_per_node,
            physical_cores=physical_cores,
        )


DEVICES = {
    device.name: device
    for device in (
        Device.of_chip(
            *("trn1", 2, 32),
            memory=32 * GIB,
            tflops=190,
            float32_tflops=47.5,
            memory_gbytes=820,
            link_gbytes=384,
            network_gbits=800,
        ),
        Device.of_chip(
            *("trn2", 4, 64),
            memory=96 * GIB,
            tflops=667,
            float32_tflops=181,
            memory_gbytes=2900,
            link_gbytes=1280,
            network_gbits=3200,
            physical_cores=DEFAULT_LNC,
        ),
    )
}
"""trn1: a trn1.32xlarge; trn2: a trn2.48xlarge."""


def device_of(chip: str, lnc: int | None) -> Device:
    """A rank's share of ``chip``, a key of DEVICES, whose device is ``lnc`` physical cores (``trainer.lnc``):
    of trn2 with 1 half of what it is by default, twice per node. trn1 has no such choice."""
    device = DEVICES[chip]
    if chip == "trn1" or (lnc or DEFAULT_LNC) == DEFAULT_LNC:
        return device
    return replace(
        device,
        name=f"{chip}, lnc 1",
        cores_per_node=device.cores_per_node * 2,
        memory=device.memory // 2,
        flops=device.flops / 2,
        float32_flops=device.float32_flops / 2,
        memory_bandwidth=device.memory_bandwidth / 2,
        link_bandwidth=device.link_bandwidth / 2,
        network_bandwidth=device.network_bandwidth / 2,
        physical_cores=1,
    )


SHORT_TRANSFER = 512
"""Bytes: fewer are taken to take as long, as each transfer is a descriptor of its own. An assumption: AWS
publishes no figure that we found."""

# Cards, whose steps are measured against their rate and not estimated

CARDS = {
    "A100": 312 * TERA,
    "H100 NVL": 835 * TERA,
    "H100 PCIe": 756 * TERA,
    "H100": 989 * TERA,
    "H200": 989 * TERA,
    "B200": 2250 * TERA,
    "L40S": 362 * TERA,
}
"""Words of a card's name, as CUDA has it -> operations per second of dense products in bf16, of NVIDIA's data
sheets (where these count sparsity, half of what they say); the first whose words are all there counts."""


def card_flops(name: str) -> float | None:
    """The rate of the card that CUDA calls ``name``; None for others than CARDS, and for a part of one."""
    words = set(re.split(r"[ -]", name))
    if "MIG" in words:
        return None
    return next((rate for card, rate in CARDS.items() if set(card.split()) <= words), None)
