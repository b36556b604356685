"""Names and stacks: which tensors of a file make up which tensor of transformers' modules, as transformers itself maps
them when it loads a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


class Conversion:
    """For every tensor that a model's modules hold, the names in the files that it is made of."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self.model = model
        mapping = get_model_conversion_mapping(model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {pattern: m for m in converters for pattern in m.source_patterns}
        wanted = model.state_dict()
        self.sources: dict[str, list[tuple[str, str | None]]] = {}
        self._converters: dict[str, WeightConverter] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
            if target not in wanted and name in wanted:
                target, pattern = name, None
            if target not in wanted:
                continue  # of another part: vision, or the prediction of later tokens
            self.sources.setdefault(target, []).append((name, pattern))
            if pattern is not None:
                self._converters[target] = by_pattern[pattern]

    def as_stored(self, target: str) -> str | None:
        """The name in the files of a module's tensor; None where it is not stored as it is."""
        return None if target in self._converters else self.sources[target][0][0]

    def tensor(self, target: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor of the module, stacked from what ``read`` gives for each of its names. Raises KeyError."""
        sources = self.sources[target]
        if target not in self._converters:
            return read(sources[0][0])
        converter = deepcopy(self._converters[target])
        for name, pattern in sources:
            converter.add_tensor(target, name, str(pattern), read(name))  # type: ignore[arg-type]  # a future or a tensor
        made = converter.convert(target, model=self.model, config=self.model.config)
        tensor = made[target]
        return tensor[0] if isinstance(tensor, list) else tensor
