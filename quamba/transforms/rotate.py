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
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
        self.block = hadamard.block_size(size)

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """W R for a weight [..., D] that reads the stream, or rows [..., D] that enter it; fp64. Of what reads several
        tensors of the stream side by side [..., n D], each is rotated."""
        parts = weight.double().unflatten(-1, (-1, self.size)) * self.signs.to(weight.device)
        return hadamard.rotate(parts, self.block).flatten(-2)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """R^T W for a weight [..., D, K] that writes into the stream; fp64."""
        return self.columns(weight.double().mT).mT

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """x R^T for a rotated stream x [..., D]; fp64."""
        return hadamard.unrotate(x.double(), self.block) * self.signs.to(x.device)


def residual_rotation(size: int, seed: int) -> ResidualRotation:
    """The rotation of a residual stream of ``size`` channels."""
    return ResidualRotation(size, seed)


def rotate_residual(tensors: Tensors, sublayer: Sublayer, rotation: ResidualRotation) -> Tensors:
    """Rotate what a sublayer reads from and writes into the residual stream. Returns a new dict.

    The norm's gain must have been folded before.
    """
    out, mixer = dict(tensors), sublayer.mixer
    for proj in mixer.projs:
        weight, bias = mixer.name(proj.weight), mixer.name(f"{proj.path}.bias")
        if proj.reads == "residual":
            out[weight] = rotation.columns(out[weight])
        if any(output.name == "residual" for output in proj.outputs):
            out[weight] = rotation.rows(out[weight])
            if bias in out:
                out[bias] = rotation.columns(out[bias])
    return out


def output_block(mixer: MixerSpec, asked: int | None) -> int:
    """Size of the online Hadamard blocks before out_proj: the one asked for, else the largest that exists; 0 where
    nothing is projected back.

    Raises UserError when the block asked for does not divide the channels there or has no Hadamard matrix.
    """
    if mixer.out_proj is None:
        return 0
    inner = mixer.size(mixer.out_proj.input)
    if asked is None:
        return hadamard.block_size(inner)
    if inner % asked or hadamard.factor(asked) is None:
        raise UserError(
            f"rotate.block {asked} must divide the {inner} channels that {mixer.out_proj.role} reads and be the order "
            "of a Hadamard matrix"
        )
    return asked


def rotate_output(tensors: Tensors, sublayer: Sublayer, block: int) -> Tensors:
    """W_out <- W_out H, to be fed with y H (Quamba, section 4.2). Returns a new dict."""
    out_proj = sublayer.mixer.out_proj
    if out_proj is None:
        return tensors
    name = sublayer.mixer.name(out_proj.weight)
    return {**tensors, name: hadamard.rotate(tensors[name].double(), block)}


def rotate_values(tensors: Tensors, sublayer: Sublayer) -> Tensors:
    """v <- v H within each head and W_out <- W_out diag(g) H, g being the gain of the norm in between, which becomes 1:
    nothing is left to do at run time. Returns a new dict."""
    mixer = sublayer.mixer
    assert mixer.out_proj is not None and mixer.out is not None
    value = next(i for i in mixer.inputs if i.semantics == "value")
    block = hadamard.block_size(mixer.axes[value.axes[-1]].size)
    out = rotate_rows(tensors, mixer, value.name, hadamard.hadamard_matrix(block))
    path = mixer.name(mixer.out_proj.weight)
    if mixer.out.norm_weight is not None:
        norm = mixer.name(mixer.out.norm_weight)
        gain = out[norm]
        out |= {path: out[path] * gain.repeat(out[path].shape[1] // len(gain)), norm: torch.ones_like(gain)}
    return {**out, path: hadamard.rotate(out[path].double(), block)}


def rotate_rows(tensors: Tensors, mixer: MixerSpec, name: str, rotation: torch.Tensor) -> Tensors:
    """Rotate the last axis of one named output in the projection that makes it. Returns a new dict."""
    out = dict(tensors)
    for proj in mixer.projs:
        rows = mixer.rows(proj, name)
        for path in (mixer.name(proj.weight), mixer.name(f"{proj.path}.bias")) if rows else ():
            if path in out:
                made = out[path].clone()
                part = made[rows].view(-1, rotation.shape[0], made[0].numel())
                made[rows] = (rotation.to(made).T @ part).view(len(rows), *made.shape[1:])
                out[path] = made
    return out
