"""accelerate: what a device map puts off the device that computes comes there block by block, and goes again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from accelerate.utils import send_to_device
from torch import nn

from quamba.models.spec import ModelSpec
from quamba.modules.lowbit import LowBit


class Onload(ModelHook):
    """Brings all tensors of a module, codes and scales included, to the device before it runs, and lets them go after.

    accelerate would hook every leaf instead. But a mixer reads tensors of its children without calling them, codes are
    buffers, which accelerate does not put off unless told, and prepacked weights would outlive what they are made of.
    waiting: the tensors by their names in the model, in host memory or read from disk; path: of the module.
    """

    def __init__(self, device: Any, waiting: Mapping[str, torch.Tensor], path: str, skip_keys: Any) -> None:
        self.device, self.waiting, self.path, self.skip_keys = device, waiting, path, skip_keys

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Let the tensors go that the model stores, and bring the others for good."""
        for _, owner, leaf, tensor in self._tensors(module, stored=False):
            _set(owner, leaf, tensor.to(self.device))
        return self.post_forward(module, module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the tensors, and the arguments to them."""
        for name, owner, leaf, _ in self._tensors(module):
            _set(owner, leaf, self.waiting[name].to(self.device))
        return send_to_device(args, self.device), send_to_device(kwargs, self.device, skip_keys=self.skip_keys)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Let the tensors go."""
        for part in module.modules():
            if isinstance(part, LowBit):
                part.unbind()
        for _, owner, leaf, tensor in self._tensors(module):
            _set(owner, leaf, tensor.to("meta"))
        return output

    def _tensors(
        self, module: nn.Module, stored: bool = True
    ) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
        """Name in the model, owner, name there and value of every tensor that is stored with the model, or is not."""
        for path, owner in module.named_modules(prefix=self.path):
            for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                if tensor is not None and stored != (leaf in owner._non_persistent_buffers_set):
                    yield f"{path}.{leaf}", owner, leaf, tensor


def _set(owner: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def whole_parts(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Paths of blocks, embedding, last norm and head, each with those of its modules that run elsewhere too."""
    blocks = {block.path: spec.lent(block) for block in spec.blocks}
    return {spec.embedding: (), **blocks, spec.final_norm: (), spec.head: ()}


def mapped_parts(model: Any, tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The same of a model that no file describes: the modules that its device map names. tied: path of a linear -> path
    of the one that stands there too."""
    modules = dict(model.named_modules())
    paths = [path for path in model.hf_device_map if path in modules]
    return {path: tuple({lender for lender in tied.values() if lender.startswith(f"{path}.")}) for path in paths}


def onload_whole(model: nn.Module, parts: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Let modules, and those in them that others call too, come and go whole where accelerate has put them off; paths
    of those that are off."""
    off = []
    for path, lent in parts.items():
        module = model.get_submodule(path)
        leaf = _leaf(module)
        if leaf is not None:
            waiting: Any = leaf.weights_map
            remove_hook_from_submodules(module)
            for each in (path, *lent):
                hook = Onload(leaf.execution_device, waiting.dataset, each, leaf.skip_keys)
                add_hook_to_module(model.get_submodule(each), hook)
            off.append(path)
    return off


def _leaf(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook of some part of a module that is put off."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            if isinstance(each, AlignDevicesHook) and each.offload:
                return each
    return None
