"""A transformers model without its weights: what its layers are, and what it passes them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quamba.models.spec import ModelSpec
from quamba.modules.host import Arguments, put


class Skeleton:
    """The modules of a model on the meta device; buffers that are computed from the config are real."""

    def __init__(self, config: Any, spec: ModelSpec) -> None:
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.spec = spec
        for module in self.model.modules():
            computed = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if computed:
                with torch.no_grad():
                    self.model._init_weights(module)

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor outside the layers and the ends, which what the model passes its layers is computed from."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, nn.Parameter(tensor.float(), requires_grad=False))

    def layer(self, path: str) -> nn.Module:
        """A layer by its path, given away: the skeleton forgets it."""
        found: nn.Module = self.model.get_submodule(path)
        put(self.model, path, nn.Identity())
        return found

    def copy(self, path: str) -> nn.Module:
        """A layer by its path, made again."""
        return deepcopy(self.model.get_submodule(path))

    def record(
        self, embedding: nn.Module, tokens: torch.Tensor, batch_size: int, shorter: int
    ) -> tuple[torch.Tensor, dict[str, Arguments]]:
        """Feed tokens int64 [samples, T] through everything but the layers: what enters the first of them, fp32
        [samples, T, D], and what each is passed, by its path. Where layers are passed what left the embedding, it lies
        beside the hidden states, [samples, T, 2 D]. shorter: what batches of that size are passed is recorded too."""
        layers = {block.path: self.model.get_submodule(block.path) for block in self.spec.blocks}
        ends = {path: self.model.get_submodule(path) for path in (self.spec.final_norm, self.spec.head)}
        embedded = self.model.get_submodule(self.spec.embedding)
        recorders = {path: _Recorder(layer, self.spec.returns) for path, layer in layers.items()}
        for path, module in {**recorders, **dict.fromkeys(ends, _Through()), self.spec.embedding: embedding}.items():
            put(self.model, path, module)
        first = recorders[self.spec.blocks[0].path]
        hidden = []
        for part in tokens.split(batch_size):
            self.model(input_ids=part, use_cache=False)
            assert first.hidden is not None
            entering = first.hidden.float()
            hidden.append(torch.cat([entering] * 2, -1) if self.spec.passes_embedding else entering)
        if shorter:
            self.model(input_ids=tokens[:shorter], use_cache=False)
        for path, module in {**layers, **ends, self.spec.embedding: embedded}.items():
            put(self.model, path, module)
        return torch.cat(hidden), {path: recorder.arguments for path, recorder in recorders.items()}


class _Recorder(nn.Module):
    """Stands where a layer stood, and answers for its attributes; returns what enters, in the layer's own form."""

    def __init__(self, layer: nn.Module, returns: int) -> None:
        super().__init__()
        self.stood, self.returns = [layer], returns
        self.hidden: torch.Tensor | None = None
        self.arguments: Arguments = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stood"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden = hidden_states
        self.arguments.setdefault(len(hidden_states), (args, kwargs))
        return (hidden_states, *[None] * (self.returns - 1)) if self.returns else hidden_states


class _Through(nn.Identity):
    weight = torch.empty(0)
    """Some models look at the type of their head."""
