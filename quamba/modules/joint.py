"""What a step of several blocks in one op takes from a block, for every kind of mixer that has such an op."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from quamba.modules.linear import Linear
from quamba.modules.mixer import Mixer
from quamba.modules.norm import Norm
from quamba.modules.selective import SelectiveMixer
from quamba.modules.ssd import SSDMixer
from quamba.modules.state import RecurrentState
from quamba_kernels import Op, ops
from quamba_kernels.ops import BlockMemory, SelectiveBlock, SsdBlock


class Joint(ABC):
    """Blocks of one kind of mixer: their op, and what it is given."""

    op: Op
    parts: tuple[Op, ...]
    """What it stands for, beside the linears."""

    def streamed(self, mixer: Mixer) -> list[Linear]:
        """The linears that are of one format, from in_proj to out_proj."""
        return [mixer.linear("in_proj"), mixer.linear(mixer.out.role)]

    def linears(self, mixer: Mixer) -> list[Linear]:
        """All linears."""
        return self.streamed(mixer)

    @abstractmethod
    def takes(self, mixer: Mixer) -> bool:
        """Whether the op can say what this mixer does, whose linears are of one format."""

    @abstractmethod
    def alike(self, mixer: Mixer) -> tuple[Any, ...]:
        """What mixers that take a step together have in common, beside what every mixer has."""

    @abstractmethod
    def constants(self, mixer: Mixer, norm: Norm) -> Any:
        """Of a block, bound."""

    def memory(self, state: RecurrentState) -> BlockMemory:
        """Of a block."""
        return BlockMemory(state.conv, state.recurrent, state.scale, state.rng)

    def options(self, mixer: Mixer) -> dict[str, Any]:
        """What the op takes beside linear, eps, block and in_dtype."""
        return {}

    def _shared(self, mixer: Mixer, norm: Norm) -> dict[str, Any]:
        into, out = mixer.linear("in_proj"), mixer.linear(mixer.out.role)
        return {
            "norm_weight": None if norm.folded else norm.weight, "in_scale": into.input.shared_scale,
            "in_weights": into._weights, "in_bias": into.bias, "conv_weight": mixer.conv1d.taps,
            "conv_bias": mixer.conv1d.bias, "conv_in_scale": mixer._conv_in_scale,
            "conv_weight_scale": mixer.conv1d.scale, "conv_out_scale": mixer._conv_out_scale,
            "z_scale": mixer._z_scale, "out_scale": out.input.shared_scale, "out_weights": out._weights,
            "out_bias": out.bias,
        }  # fmt: skip


class JointSSD(Joint):
    """Mamba2."""

    op, parts = ops.ssd_stack, (ops.norm_linear, ops.ssd_decode)

    def takes(self, mixer: Mixer) -> bool:
        return True

    def alike(self, mixer: Mixer) -> tuple[Any, ...]:
        return mixer.mixer_spec.dt_limit, mixer.eps, mixer.out.norm_groups

    def constants(self, mixer: Mixer, norm: Norm) -> SsdBlock:
        assert isinstance(mixer, SSDMixer)
        A, D, dt_bias = mixer._rates
        fields = {**self._shared(mixer, norm), **mixer._scales}
        gain = None if mixer.norm is None else mixer.norm.weight
        return SsdBlock(**fields, A=A, D=D, dt_bias=dt_bias, gate_weight=gain)

    def options(self, mixer: Mixer) -> dict[str, Any]:
        spec = mixer.mixer_spec
        return {"gate_eps": mixer.eps, "dt_limit": spec.dt_limit, "norm_groups": mixer.out.norm_groups}


class JointSelective(Joint):
    """Mamba1."""

    op, parts = ops.selective_stack, (ops.norm_linear, ops.conv_decode, ops.selective_decode)

    def streamed(self, mixer: Mixer) -> list[Linear]:
        into, out = super().streamed(mixer)
        return [into, mixer.linear("x_proj"), out]

    def linears(self, mixer: Mixer) -> list[Linear]:
        return [*self.streamed(mixer), mixer.linear("dt_proj")]

    def takes(self, mixer: Mixer) -> bool:
        assert isinstance(mixer, SelectiveMixer)
        rates = mixer.linear("dt_proj")
        by_token = rates.format.op is ops.linear_w8a8 and rates.input.per_token
        return by_token and not mixer.norms and mixer.linear("x_proj").bias is None

    def alike(self, mixer: Mixer) -> tuple[Any, ...]:
        return (mixer.linear("dt_proj").bias is None,)

    def constants(self, mixer: Mixer, norm: Norm) -> SelectiveBlock:
        assert isinstance(mixer, SelectiveMixer)
        rates, (A, D) = mixer.linear("dt_proj"), mixer._rates
        return SelectiveBlock(
            **self._shared(mixer, norm), x_weights=mixer.linear("x_proj")._weights, dt_weights=rates._weights,
            dt_bias=rates.bias, A=A, D=D, x_scale=mixer.sites["x"].shared_scale, B_scale=mixer._scales["B_scale"],
            C_scale=mixer._scales["C_scale"],
        )  # fmt: skip


JOINTS: dict[type[Mixer], Joint] = {SSDMixer: JointSSD(), SelectiveMixer: JointSelective()}
