"""Short causal depthwise convolution over tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import conv1d, silu

from quamba.linear_attention.cache import NamedTensors


class ShortConvolution(nn.Conv1d):
    """y[t] = act(sum_w weight[w] x[t - W + 1 + w] + bias) per channel; weight [C, 1, W], bias [C]."""

    def __init__(self, channels: int, width: int, *, activation: bool = True, bias: bool = False) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor, state: NamedTensors | None = None, name: str = "conv") -> torch.Tensor:
        """x [B, T, C] -> the same; the last W - 1 inputs stay in the state under ``name``."""
        width = self.kernel_size[0]
        past = None if state is None else state.get(name)
        if past is None:
            past = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        full = torch.cat([past, x], 1)
        if state is not None:
            state.put(name, full[:, x.shape[1] :])
        y = conv1d(full.transpose(1, 2), self.weight, self.bias, groups=self.groups).transpose(1, 2)
        return silu(y) if self.activation else y
