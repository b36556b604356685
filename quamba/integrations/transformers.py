"""transformers: quantised directories open with from_pretrained, with no trust_remote_code, once quamba is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from quamba.arena import settle
from quamba.errors import UserError
from quamba.layouts.huggingface import contents
from quamba.layouts.layout import Index
from quamba.models import ARCHITECTURES, describe
from quamba.modules.block import RecurrentBlock
from quamba.modules.borrowed import Borrowed
from quamba.modules.embedding import Embedding
from quamba.modules.host import becomes_delta_rule, fit, folds, mixer_class, put
from quamba.modules.linear import Linear
from quamba.modules.lowbit import LowBit
from quamba.modules.norm import LastNorm
from quamba.modules.undescribed import replace
from quamba.recipe import FLOAT, FORMAT_VERSION, Recipe, parse_recipe
from quamba.transforms import fold_factors

NAME = "quamba"
CODES = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}
"""Types that hold codes, as safetensors names them."""


class QuambaConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a quantised directory: a format version and the resolved recipe. linears_only:
    of a model that no file describes, "kept": paths of the linears that stay floats, and "tied": path -> path of the
    linear that stands there too."""

    quant_method: Any  # transformers takes any name here, but declares an enumeration of its own

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        linears_only: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = NAME
        self.recipe = recipe or FLOAT.model_dump(mode="json")
        self.format_version = format_version
        if linears_only is not None:
            self.linears_only = linears_only
        if format_version not in range(1, FORMAT_VERSION + 1):
            raise UserError(
                f"this directory has quamba format version {format_version}, this quamba reads up to {FORMAT_VERSION}: "
                "upgrade quamba"
            )


class QuambaQuantizer(HfQuantizer):
    """Puts quantised modules where transformers would have its own, before the weights arrive."""

    requires_calibration = True
    quantization_config: QuambaConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        recipe = parse_recipe(self.quantization_config.recipe, "quantization_config")
        dtype = model.config.dtype or torch.float32
        undescribed = getattr(self.quantization_config, "linears_only", None)
        if undescribed is None:
            swap(model, recipe, dtype, "meta")
            # a device map made by "auto" keeps blocks whole by the names of their classes
            model._no_split_modules = {*(model._no_split_modules or ()), RecurrentBlock.__name__}
        else:
            kept, tied = undescribed.get("kept", []), undescribed.get("tied", {})
            for linear in replace(model, recipe, kept, tied, dtype, "meta").values():
                linear._is_hf_initialized = True
        stored: Index = {}
        for file in checkpoint_files or []:
            stored |= contents(Path(file))
        for name, tensor in model.state_dict().items() if stored else ():
            # transformers would go on with zeros in the place of what is missing
            got = stored[name].shape if name in stored else None
            if got != tuple(tensor.shape):
                wanted = f"tensor {name!r} should be {list(tensor.shape)} by config and recipe"
                raise UserError(f"{wanted}, and is {'missing' if got is None else list(got)}; quantise the model again")
            kind = stored[name].type
            if kind and kind != CODES.get(tensor.dtype, kind):  # transformers would convert it
                raise UserError(f"tensor {name!r} should be {tensor.dtype}, and is {kind}; quantise the model again")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        waiting: tuple[str, ...] = ()
        if hasattr(model, "hf_device_map"):
            from quamba.integrations.offload import mapped_parts, onload_whole, whole_parts

            undescribed = getattr(self.quantization_config, "linears_only", None)
            parts = (
                whole_parts(describe(model.config)) if undescribed is None
                else mapped_parts(model, undescribed.get("tied", {}))
            )  # fmt: skip
            waiting = tuple(f"{path}." if path else "" for path in onload_whole(model, parts))
        for name, tensor in model.state_dict().items():
            if tensor.device.type == "meta" and not name.startswith(waiting):
                raise UserError(f"the checkpoint lacks the tensor {name!r}")
        if len(set(getattr(model, "hf_device_map", {}).values())) <= 1:  # parts that come and go own their memory
            settle(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def swap(model: Any, recipe: Recipe, dtype: torch.dtype, device: torch.device | str) -> None:
    """Replace embedding, blocks, last norm and head of a transformers model by quamba's, with empty tensors."""
    spec = describe(model.config)
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    residual = torch.float32 if spec.residual_fp32 else None  # what the first block would turn it into
    put(model, spec.embedding, Embedding(spec.vocab, spec.d_model, recipe.embedding, out_dtype=residual, **made))
    for layer, block in enumerate(spec.blocks):
        if block.hosted:
            fit(model.get_submodule(block.path), spec, block, recipe, layer, **made)
        else:
            put(model, block.path, RecurrentBlock(spec, block, recipe, layer, **made))
        if block.borrows is not None:
            path, lender = block.borrows
            put(model, f"{block.path}.{path}", Borrowed(model.get_submodule(lender)))
    folded = folds(recipe, spec.final_norm_kind)
    if folded or not spec.hosted:
        put(model, spec.final_norm, LastNorm(spec.d_model, spec.eps, folded=folded, **made))
    out = torch.float32 if spec.logits_fp32 else None  # straight from the sums
    head = Linear(spec.d_model, spec.vocab, bias=False, spec=recipe.linear("lm_head"), out_dtype=out, **made)
    put(model, spec.head, head)
    for module in model.modules():
        if isinstance(module, (LowBit, RecurrentBlock)):
            # transformers would otherwise initialise what it does not know
            module._is_hf_initialized = True


def use_operators(model: Any) -> None:
    """Let an unquantised transformers model of a known architecture run on quamba's operators, in floats."""
    if model.config.model_type not in ARCHITECTURES:
        return
    mixers = [(block, sub.mixer) for block in describe(model.config).blocks for sub in block.sublayers]
    own = [(block, mixer) for block, mixer in mixers if mixer_class(mixer) is not None]
    if not own and not any(
        becomes_delta_rule(model.get_submodule(block.path).get_submodule(mixer.path), mixer) for block, mixer in mixers
    ):
        return  # what is hosted whole runs as it is, and keeps a tied head
    weights = model.state_dict()
    for block, mixer in own:
        weights = fold_factors(weights, mixer, f"{block.path}.{mixer.path}.")
    swap(model, FLOAT, model.dtype, model.device)
    for block in describe(model.config).blocks:
        if block.borrows is not None:
            borrowed = f"{block.path}.{block.borrows[0]}."
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(borrowed)}
    model.load_state_dict(weights)


def register() -> None:
    """Make transformers know the format; calling it again changes nothing."""
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(NAME)(QuambaConfig)
        register_quantizer(NAME)(QuambaQuantizer)


register()
