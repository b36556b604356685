"""Hadamard rotations: of the residual stream (folded offline) and of out_proj's input (its inverse folded offline)."""

from __future__ import annotations

import torch

from quamba.errors import UserError
from quamba.models.spec import MixerSpec, Sublayer
from quamba_kernels import hadamard

Tensors = dict[str, torch.Tensor]


class ResidualRotation:
    """x -> x diag(signs) H, block-diagonal where no Hadamard matrix of order D is known.

    The signs are random: a Walsh matrix alone sends a constant vector to a single channel.
    """

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
        self.block = hadamard.block_size(size)

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """W R for a weight [..., D] that reads the stream, or rows [..., D] that enter it; fp64."""
        return hadamard.rotate(weight.double() * self.signs, self.block)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """R^T W for a weight [D, K] that writes into the stream; fp64."""
        return self.columns(weight.double().T).T


def residual_rotation(size: int, seed: int) -> ResidualRotation:
    """The rotation of a residual stream of ``size`` channels."""
    return ResidualRotation(size, seed)


def rotate_residual(tensors: Tensors, sublayer: Sublayer, rotation: ResidualRotation) -> Tensors:
    """Rotate what a sublayer reads from and writes into the residual stream. Returns a new dict.

    The norm's gain must have been folded before.
    """
    out = dict(tensors)
    for proj in sublayer.mixer.projs:
        name = f"{sublayer.mixer.path}.{proj.path}"
        if proj.reads == "residual":
            out[f"{name}.weight"] = rotation.columns(out[f"{name}.weight"])
        if any(output.name == "residual" for output in proj.outputs):
            out[f"{name}.weight"] = rotation.rows(out[f"{name}.weight"])
            if f"{name}.bias" in out:
                out[f"{name}.bias"] = rotation.columns(out[f"{name}.bias"])
    return out


def output_block(mixer: MixerSpec, asked: int | None) -> int:
    """Size of the online Hadamard blocks before out_proj: the one asked for, else the largest that exists.

    Raises UserError when the block asked for does not divide d_inner or has no Hadamard matrix.
    """
    inner = mixer.sizes["I"]
    if asked is None:
        return hadamard.block_size(inner)
    if inner % asked or hadamard.factor(asked) is None:
        raise UserError(f"rotate.block {asked} must divide d_inner {inner} and be the order of a Hadamard matrix")
    return asked


def rotate_output(tensors: Tensors, sublayer: Sublayer, block: int) -> Tensors:
    """W_out <- W_out H, to be fed with y H (Quamba, section 4.2). Returns a new dict."""
    name = f"{sublayer.mixer.path}.{sublayer.mixer.proj(sublayer.mixer.out.role).path}.weight"
    return {**tensors, name: hadamard.rotate(tensors[name].double(), block)}
