"""Policy: which role is quantised how. Strict, frozen, read from YAML; roles, never module names.

Linear roles (in_proj, out_proj, lm_head, ...) take a LinearSpec, activation roles (scan_x, gate, ...) an
ActivationSpec; ``layers`` overrides either for some layers, so mixed bit-widths are a recipe like any other.
"""

from __future__ import annotations

import reprlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quamba.errors import UserError
from quamba.observers import OBSERVERS

FORMAT_VERSION = 1


Seed = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ActivationSpec(_Strict):
    """How an activation becomes int8; bits 16 leaves it in the model's 16/32-bit type.

    scale: static (calibrated) or dynamic (max |x| / 127 of each token, linear inputs only).
    granularity of a static scale: tensor, channel, state_group, or cluster (Quamba2, section 4.3).
    observer: a name in quamba.observers; quantile belongs to "percentile".
    """

    bits: Literal[8, 16] = 8
    scale: Literal["static", "dynamic"] = "static"
    granularity: Literal["tensor", "channel", "state_group", "cluster"] = "tensor"
    observer: str = "absmax"
    quantile: float = Field(default=0.99999, gt=0.5, le=1)

    @field_validator("observer")
    @classmethod
    def _known_observer(cls, name: str) -> str:
        return _one_of(name, OBSERVERS)


class LinearSpec(_Strict):
    """How a linear is stored and run. format: a file in quamba.formats; group_size in input features.

    method: rtn (round to nearest) or gptq; search: clip scales by error instead of taking the maximum;
    damping: fraction of the Hessian's mean diagonal added to it; act_order: quantise columns by falling diagonal.
    """

    format: str = "float"
    group_size: int = Field(default=128, ge=8, multiple_of=8)
    method: Literal["rtn", "gptq"] = "gptq"
    search: bool = True
    damping: float = Field(default=0.01, ge=0, le=1)
    act_order: bool = False
    input: ActivationSpec = ActivationSpec()

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        from quamba.formats import FORMATS  # a format is written in terms of this module

        return _one_of(name, FORMATS)

    @model_validator(mode="after")
    def _input_that_the_format_takes(self) -> LinearSpec:
        from quamba.formats import FORMATS

        if FORMATS[self.format].int8_input and self.input.bits != 8:
            raise ValueError(f"format {self.format} takes int8 inputs, so input.bits is 8, got {self.input.bits}")
        return self

    def changed(self, changes: dict[str, Any]) -> LinearSpec:
        """This spec with what ``changes`` names laid over it. Raises ValueError for what does not fit."""
        spec: LinearSpec = _build(LinearSpec, laid_over(self.model_dump(), changes), self.format)
        return spec


class StateSpec(_Strict):
    """Storage of the recurrent state between tokens; int8 keeps one dynamic scale per row over d_state.

    dtype: of Mamba's; delta_rule: of a delta rule's in hybrids, which subtracts what it reads from itself, so that
    rounding errors come back. Every other recurrence keeps its own type.
    """

    dtype: Literal["float32", "float16", "int8"] = "float32"
    delta_rule: Literal["float32", "float16", "int8"] = "float32"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: Seed = 0


class StorageSpec(_Strict):
    """int8 (bits 8) or the checkpoint's own type (bits 16); of the convolution's weight, of the embedding."""

    bits: Literal[8, 16] = 16


class RotationSpec(_Strict):
    """Hadamard rotations. block: size of the online blocks before out_proj; None takes the largest that exists."""

    residual: bool = True
    output: bool = True
    block: int | None = Field(default=None, ge=1)
    seed: Seed = 0


class ClusterSpec(_Strict):
    """Sort-and-cluster of the value channels (Quamba2, section 4.3): clusters of heads per state group, and of
    channels per head; samples are the calibration sequences that decide the order."""

    heads: int = Field(default=4, ge=1)
    channels: int = Field(default=4, ge=1)
    samples: int = Field(default=8, ge=1)


class CalibrationSpec(_Strict):
    """How much text is seen: random windows of ``seqlen`` tokens."""

    samples: int = Field(default=64, ge=1)
    seqlen: int = Field(default=512, ge=2)
    batch_size: int = Field(default=4, ge=1)


class LayerOverride(_Strict):
    """What differs in some layers. match: "0-3,7" or a list of indices."""

    match: str
    linears: dict[str, dict[str, Any]] = {}
    activations: dict[str, dict[str, Any]] = {}
    state: dict[str, Any] = {}
    linear_state: dict[str, Any] = {}
    conv: dict[str, Any] = {}

    @field_validator("match", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> str:
        return ",".join(str(v) for v in value) if isinstance(value, list) else str(value)

    @property
    def place(self) -> str:
        """Where it stands, for errors."""
        return f"layers {self.match}: "

    def covers(self, layer: int) -> bool:
        """Whether the layer of that index is meant."""
        spans = (part.partition("-") for part in self.match.split(","))
        return any(int(low) <= layer <= int(high or low) for low, _, high in spans)

    @model_validator(mode="after")
    def _readable(self) -> LayerOverride:
        try:
            self.covers(0)
        except ValueError:
            raise ValueError(f'match {self.match!r} is not of the form "0-3,7"') from None
        return self


class WideOverride(_Strict):
    """What differs in models of ``d_model`` channels and more."""

    d_model: int = Field(ge=1)
    linears: dict[str, dict[str, Any]] = {}
    activations: dict[str, dict[str, Any]] = {}
    place: ClassVar[str] = "wide: "


class Recipe(_Strict):
    """A whole policy. ``linears`` and ``activations`` map a role, or "default", to what differs from the class.

    state: of Mamba's mixers, and by its ``delta_rule`` of delta rules in hybrids; linear_state: of
    flash-linear-attention's families, which may read their state before they write. wide: laid over the rest where a
    model is wide enough (``for_width``); layers: over both.
    """

    name: str
    summary: str = ""
    fold_norms: bool = True
    rotate: RotationSpec = RotationSpec()
    cluster: ClusterSpec | None = None
    linears: dict[str, dict[str, Any]] = {}
    activations: dict[str, dict[str, Any]] = {}
    conv: StorageSpec = StorageSpec()
    state: StateSpec = StateSpec()
    linear_state: StateSpec = StateSpec()
    embedding: StorageSpec = StorageSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    wide: WideOverride | None = None
    layers: tuple[LayerOverride, ...] = ()
    place: ClassVar[str] = ""

    @property
    def everywhere(self) -> tuple[Recipe | WideOverride | LayerOverride, ...]:
        """Itself and all that is laid over it."""
        return (self, *filter(None, [self.wide]), *self.layers)

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        if self.rotate.residual and not self.fold_norms:
            raise ValueError("rotate.residual needs fold_norms: a rotation does not commute with a norm's gain")
        for where in self.everywhere:
            for role in where.linears:
                self._merge(LinearSpec, "linears", role, where)
            for role in where.activations:
                self._merge(ActivationSpec, "activations", role, where)
        for override in self.layers:
            for name in ("state", "linear_state"):
                values = {**getattr(self, name).model_dump(), **getattr(override, name)}
                _build(StateSpec, values, f"{override.place}{name}")
            _build(StorageSpec, {**self.conv.model_dump(), **override.conv}, f"{override.place}conv")
        if self.wide is not None:
            self.for_width(self.wide.d_model)  # layers laid over both have to fit as well
        for values in (self.linear_state.model_dump(), *(override.linear_state for override in self.layers)):
            if values.get("delta_rule", "float32") != "float32":
                raise ValueError("linear_state.delta_rule: linear_state has its own dtype for all; leave it out")
        return self

    def _merge(
        self, spec: type[_Strict], field: str, role: str, override: Recipe | LayerOverride | WideOverride | None
    ) -> Any:
        chosen: dict[str, Any] = {}
        for source in (self, override) if override is not self else (self,):
            table = getattr(source, field) if source is not None else {}
            for key in ("default", role):
                chosen = laid_over(chosen, table.get(key, {}))
        return _build(spec, chosen, f"{override.place if override is not None else ''}{field}.{role}")

    def for_width(self, d_model: int) -> Recipe:
        """The recipe for a model of that many channels, which names no others."""
        if self.wide is None:
            return self
        data = self.model_dump(exclude={"wide"})
        if d_model >= self.wide.d_model:
            data["linears"] = laid_over(self.linears, self.wide.linears)
            data["activations"] = laid_over(self.activations, self.wide.activations)
        return Recipe(**data)

    def _override(self, layer: int | None) -> LayerOverride | None:
        matching = [o for o in self.layers if layer is not None and o.covers(layer)]
        return matching[-1] if matching else None

    def linear(self, role: str, layer: int | None = None) -> LinearSpec:
        """The spec of a linear role: class defaults <- default <- role <- the last matching layer override."""
        spec: LinearSpec = self._merge(LinearSpec, "linears", role, self._override(layer))
        return spec

    def activation(self, role: str, layer: int | None = None) -> ActivationSpec:
        """The spec of an activation role; a role that the recipe does not name stays in 16/32 bits."""
        named = role in self.activations or "default" in self.activations
        override = self._override(layer)
        named = named or (override is not None and bool({role, "default"} & set(override.activations)))
        if not named:
            return ActivationSpec(bits=16)
        spec: ActivationSpec = self._merge(ActivationSpec, "activations", role, override)
        return spec

    def state_of(self, layer: int) -> StateSpec:
        """Storage of the recurrent state in one layer."""
        override = self._override(layer)
        return StateSpec(**{**self.state.model_dump(), **(override.state if override else {})})

    def linear_state_of(self, layer: int) -> StateSpec:
        """Storage of a linear attention's state in one layer."""
        override = self._override(layer)
        return StateSpec(**{**self.linear_state.model_dump(), **(override.linear_state if override else {})})

    def conv_of(self, layer: int) -> StorageSpec:
        """Storage of the convolution's weight in one layer."""
        override = self._override(layer)
        return StorageSpec(**{**self.conv.model_dump(), **(override.conv if override else {})})

    def as_yaml(self) -> str:
        """The text of a file that load_recipe reads back as this recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


FLOAT = Recipe(
    name="float", summary="Nothing is changed.", fold_norms=False, rotate=RotationSpec(residual=False, output=False)
)


def _one_of(name: str, known: dict[str, Any]) -> str:
    if name not in known:
        raise ValueError(f"should be one of {', '.join(sorted(known))}")
    return name


def _build(spec: type[_Strict], values: dict[str, Any], where: str) -> Any:
    """A spec from values laid over each other; what is wrong with them is told with where they stand."""
    try:
        return spec(**values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error)}") from None


def laid_over(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with the keys of ``new`` over it, nested mappings key by key."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = laid_over(merged[key], value) if both else value
    return merged


def stock_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that ship with quamba."""
    folder = Path(str(resources.files("quamba") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path | Recipe) -> Recipe:
    """A stock recipe by name, or one read from a YAML file.

    Raises UserError for an unknown name, unreadable YAML, unknown keys (listing the known ones) and bad values.
    """
    if isinstance(source, Recipe):
        return source
    stock = stock_recipes()
    path = stock.get(str(source), Path(source))
    if not path.is_file():
        raise UserError(f"recipe {str(source)!r} is neither a stock recipe ({', '.join(stock)}) nor a YAML file")
    return parse_recipe(read_yaml(path, "recipe"), str(path))


def read_yaml(path: Path, what: str) -> Any:
    """The data of a YAML file; ``what`` it is meant to be names it in errors. Raises UserError where it is none."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers raise errors of their own
        raise UserError(f"{what} {path} is not readable YAML: {' '.join(str(error).split())}") from None


def parse_recipe(data: Any, origin: str) -> Recipe:
    """A recipe from plain data; ``origin`` names it in errors. Raises UserError as load_recipe does."""
    if not isinstance(data, dict):
        raise UserError(f"recipe {origin} must be a mapping of keys, got {type(data).__name__}")
    try:
        return Recipe(**{"name": Path(origin).stem, **data})
    except (ValidationError, TypeError) as error:
        raise UserError(f"recipe {origin}: {_sentence(error)}") from None


def _sentence(error: ValidationError | TypeError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; known keys are {', '.join(_known(error.title, first['loc']))}"
    message = str(first["msg"]).removeprefix("Value error, ")
    # what the whole recipe violates has told its place and its value already
    return f"{where}: {message}, got {reprlib.repr(first['input'])}"[:400] if first["loc"] else message


def _known(title: str, location: tuple[int | str, ...]) -> list[str]:
    """The fields of the model in which an unknown key was found."""
    model: Any = next((c for c in _Strict.__subclasses__() if c.__name__ == title), Recipe)
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:
            found = [c for c in _Strict.__subclasses__() if c.__name__ in str(field.annotation)]
            model = found[0] if found else model
    return sorted(model.model_fields)
