"""What enters a recurrence that stays transformers': rounded to int8 and back where the module that runs it is called,
or where it leaves its projection."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quamba.models.spec import MixerSpec, ScanInput
from quamba.modules.scan_inputs import ScanInputs
from quamba.recipe import Recipe
from quamba_kernels.ops import dequantize

NAME = "scan_inputs"


class WatchedInputs(ScanInputs):
    """The sites of a mixer whose recurrence is not quamba's, and the hooks that lead its inputs through them."""

    def attach(
        self,
        part: nn.Module,
        spec: MixerSpec,
        recipe: Recipe,
        layer: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the sites that the recipe asks for, and hook the modules that the description names; without any,
        nothing is changed."""
        watched = tuple(i for i in spec.inputs if i.at is not None)
        self.furnish(replace(spec, inputs=watched), recipe, layer, dtype=dtype, device=device)
        for i in watched:
            if f"scan_{i.name}" in self._modules:
                self._hook(part, i)
        if self.sites:
            part.add_module(NAME, self)

    def _hook(self, part: nn.Module, i: ScanInput) -> None:
        path, argument = i.at or ("", None)
        module = part.get_submodule(path)
        if argument is None:
            module.register_forward_hook(lambda module, args, output: self.round(i.name, output))
            return
        place = list(inspect.signature(module.forward).parameters).index(argument)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if argument in kwargs:
                return args, {**kwargs, argument: self.round(i.name, kwargs[argument])}
            return (*args[:place], self.round(i.name, args[place]), *args[place + 1 :]), kwargs

        module.register_forward_pre_hook(enter, with_kwargs=True)

    def round(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, C], or [B, H, T, C / H], as its site makes it: on the grid of its scale, in its own type."""
        site: Any = self._modules[f"scan_{name}"]
        apart = x.shape[-1] != site.channels
        flat = x.transpose(1, 2).flatten(2) if apart else x
        y = dequantize(*site(flat.to(site.dtype))).to(x.dtype)
        return y.unflatten(2, (x.shape[1], -1)).transpose(1, 2) if apart else y
