"""One option of a part in the place of floats: rounded weights, and inputs of the kind that the option asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quamba import calibrate, formats
from quamba.budget.parts import Option, Part
from quamba.modules.linear import Linear
from quamba.modules.site import Site
from quamba.quantizers import Hessian
from quamba.recipe import LinearSpec

Run = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


class Instead:
    """While entered, linears that hold floats run on what a spec would make of them, with other sites for their inputs.

    What a format stores is what its dequantised weight and the quantised inputs multiply to, up to fp32's rounding.
    """

    def __init__(self, linears: list[Linear], spec: LinearSpec, hessians: list[Hessian], sites: list[Site]) -> None:
        self.linears, self.sites = linears, sites
        self.before = [(linear.held, linear.input) for linear in linears]
        self.weights = [rounded(linear, spec, hessian) for linear, hessian in zip(linears, hessians, strict=True)]

    def __enter__(self) -> None:
        for linear, weight, site in zip(self.linears, self.weights, self.sites, strict=True):
            linear.held, linear.input = weight, site

    def __exit__(self, *error: object) -> None:
        for linear, (weight, site) in zip(self.linears, self.before, strict=True):
            linear.held, linear.input = weight, site


def rounded(linear: Linear, spec: LinearSpec, hessian: Hessian) -> torch.Tensor:
    """The fp32 weight [O, K] that is left in a spec of what a linear holds."""
    assert linear.held is not None
    scratch = Linear(
        linear.features, linear.outputs, bias=False, spec=spec, dtype=linear.dtype, device=linear.held.device
    )
    scratch.hold(linear.held, None)
    scratch.quantise(hessian)
    return scratch.format.dequantize({name: getattr(scratch, name) for name in scratch.names})


def input_kind(option: Option) -> str:
    """Options of one kind may share the sites of their inputs."""
    return repr((formats.get(option.spec.format).int8_input, option.spec.input))


def input_sites(part: Part, linears: list[Linear], run: Run, stream: calibrate.Samples) -> dict[str, list[Site]]:
    """For each kind of input that the options ask for, a calibrated site for every linear."""
    made: dict[str, list[Site]] = {}
    for option in part.options:
        if input_kind(option) in made:
            continue
        sites = made[input_kind(option)] = [_site(linear, option.spec) for linear in linears]
        if not sites[0].static:
            continue
        before = [linear.input for linear in linears]
        for linear, site in zip(linears, sites, strict=True):
            site.observe()
            linear.input = site
        for batch in stream.batches():
            run(*batch)
        for linear, site, old in zip(linears, sites, before, strict=True):
            site.settle()
            linear.input = old
    return made


def _site(linear: Linear, spec: LinearSpec) -> Site:
    """The site that a linear of that spec would have, in the place of this one's."""
    device, block = linear.input._any_device(), linear.input.block
    return Linear(linear.features, 8, bias=False, spec=spec, block=block, dtype=linear.dtype, device=device).input
