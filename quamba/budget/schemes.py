"""The schemes among which a budget chooses: a YAML file in recipes/schemes, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from quamba.errors import UserError
from quamba.formats import FORMATS
from quamba.recipe import LinearSpec, parse_recipe, read_yaml

KEYS = {"summary": str, "inputs": str, "samples": int, "schemes": dict}
DEFAULT = "same-inputs"


@dataclass(frozen=True)
class Schemes:
    """name -> what a scheme lays over the spec that the recipe gives a linear.

    same_inputs: offer a linear only formats that take inputs of the kind (int8, floats) which its own takes, so that
    the arithmetic stays the recipe's. samples: how many of the calibration windows are read by every candidate.
    """

    name: str
    known: dict[str, dict[str, Any]]
    same_inputs: bool = True
    samples: int = 8

    def offered(self, spec: LinearSpec) -> dict[str, tuple[dict[str, Any], LinearSpec]]:
        """Scheme -> its changes, and how it would store a linear whose spec by the recipe is given."""
        kind = FORMATS[spec.format].int8_input
        made = {name: (changes, spec.changed(changes)) for name, changes in self.known.items()}
        return {n: m for n, m in made.items() if not self.same_inputs or FORMATS[m[1].format].int8_input == kind}


def stock_schemes() -> dict[str, Path]:
    """Name -> file of the lists that ship with quamba."""
    folder = Path(str(resources.files("quamba") / "recipes" / "schemes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_schemes(source: str | Path | Schemes = DEFAULT) -> Schemes:
    """A stock list by name, or one read from a YAML file.

    Raises UserError for an unknown name, unreadable YAML, unknown keys (listing the known ones) and bad values.
    """
    if isinstance(source, Schemes):
        return source
    stock = stock_schemes()
    path = stock.get(str(source), Path(source))
    if not path.is_file():
        raise UserError(f"schemes {str(source)!r} are neither a stock list ({', '.join(stock)}) nor a YAML file")
    data, where = read_yaml(path, "schemes"), f"schemes {path}"
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a mapping of keys, got {type(data).__name__}")
    for key, value in data.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}; known keys are {', '.join(KEYS)}")
        if type(value) is not KEYS[key]:
            raise UserError(f"{where}: {key} should be a {KEYS[key].__name__}, got {value!r}")
    if not data.get("schemes"):
        raise UserError(f"{where}: schemes is missing or empty; give at least one, as in w8a8: {{format: w8a8}}")
    if data.get("inputs", "same") not in ("same", "any"):
        raise UserError(f"{where}: inputs should be same or any, got {data['inputs']!r}")
    if data.get("samples", 1) < 1:
        raise UserError(f"{where}: samples should be 1 or more, got {data['samples']}")
    for name, changes in data["schemes"].items():
        parse_recipe({"linears": {"default": changes}}, f"{path}, scheme {name}")
    known = {str(name): changes for name, changes in data["schemes"].items()}
    return Schemes(path.stem, known, data.get("inputs", "same") == "same", data.get("samples", 8))
