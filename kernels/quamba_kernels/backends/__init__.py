"""Every file here is a backend; importing it registers what it serves."""

import importlib
import pkgutil

NAMES = sorted(module.name for module in pkgutil.iter_modules(__path__))
for _name in NAMES:
    importlib.import_module(f"{__name__}.{_name}")
