"""Energy of a GPU, where NVML counts it (pip install quamba[energy])."""

from __future__ import annotations

import importlib
from typing import Any

import torch


class EnergyMeter:
    """``joules`` since the driver was loaded; None without a GPU, without pynvml, or where the GPU does not count."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            # torch's numbering follows CUDA_VISIBLE_DEVICES, NVML's does not
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except ImportError:
            return
        except nvml.NVMLError:
            return
        self._nvml = nvml

    def joules(self) -> float | None:
        """The counter, which advances some tens of times a second: subtract two values far apart."""
        if self._nvml is None:
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
