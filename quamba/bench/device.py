"""Devices as data: what predictions are made for. One YAML file each, with the source of every number."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quamba.errors import UserError

GIB = 2**30


class Achievable(BaseModel):
    """Shares of the peaks that programs reach."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bandwidth: float = Field(default=0.85, gt=0, le=1)
    fp16: float = Field(default=0.8, gt=0, le=1)
    int8: float = Field(default=0.7, gt=0, le=1)


class Device(BaseModel):
    """memory in GiB, of which reserved_gib are never ours; bandwidth in 10^9 bytes, fp16 and int8 in 10^12 dense
    operations, exponentials in 10^12, all per second; kernel_gap in microseconds between dependent kernels of a graph.

    matches: what the driver's name of the device contains.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    memory_gib: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    fp16: float = Field(gt=0)
    int8: float = Field(gt=0)
    exponentials: float | None = Field(default=None, gt=0)
    reserved_gib: float = Field(default=0.5, ge=0)
    kernel_gap: float = Field(default=1.5, ge=0)
    achievable: Achievable = Achievable()
    matches: str | None = None
    sources: dict[str, str] = {}

    def fits(self, size: float) -> bool:
        """Whether so many bytes are there for a model."""
        return size <= (self.memory_gib - self.reserved_gib) * GIB


def shipped() -> dict[str, Path]:
    """Name -> file of the devices that come with quamba."""
    folder = Path(str(resources.files(__package__))) / "devices"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_device(source: str | Path) -> Device:
    """A shipped device by name, or one from a YAML file with at least memory_gib, bandwidth, fp16 and int8.

    Raises UserError for an unknown name, an unreadable file, unknown keys and bad values.
    """
    known = shipped()
    path = known.get(str(source), Path(source))
    if not path.is_file():
        raise UserError(f"There is no device '{source}'; known are {', '.join(known)}, or give a YAML file.")
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise UserError(f"device {path} must be a mapping of keys, got {type(data).__name__}")
        return Device(**{"name": path.stem, **data})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"device {path} is not readable YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known_keys = ", ".join(Device.model_fields)
        raise UserError(f"device {path}: {where}: {first['msg']}; the keys are {known_keys}") from None


def recognise(name: str) -> Device | None:
    """The shipped device whose ``matches`` is part of the driver's name, if there is one."""
    devices = (load_device(known) for known in shipped())
    return next((d for d in devices if d.matches is not None and d.matches in name), None)
