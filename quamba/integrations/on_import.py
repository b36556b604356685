"""Register with transformers the moment it imports what we add to, so that `import quamba` waits for nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERS = {
    "transformers.quantizers": "quamba.integrations.transformers",
    "transformers.models.auto.configuration_auto": "quamba.integrations.auto_config",
    "transformers.models.auto.modeling_auto": "quamba.integrations.auto_model",
}
"""The module to watch -> ours, which registers and may import no other watched module that is not loaded before it."""


class _ThenRegister(Loader):
    """Loads a module as its own loader does, then imports what registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        import_module(REGISTERS[module.__name__])


class _Watch(MetaPathFinder):
    """Finds the watched modules where the other finders do, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REGISTERS:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Watch))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def install() -> None:
    """Register now where transformers has the module already, else when it imports it."""
    for watched, registers in REGISTERS.items():
        if watched in sys.modules:
            import_module(registers)
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
