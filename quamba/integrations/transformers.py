"""transformers: quantised directories open with from_pretrained, with no trust_remote_code, once quamba is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from quamba.errors import UserError
from quamba.layouts.huggingface import contents
from quamba.layouts.layout import Index
from quamba.models import ARCHITECTURES, describe
from quamba.modules.block import RecurrentBlock
from quamba.modules.embedding import Embedding
from quamba.modules.host import fit, folds, mixer_class, put
from quamba.modules.linear import Linear
from quamba.modules.lowbit import LowBit
from quamba.modules.norm import Norm
from quamba.recipe import FLOAT, FORMAT_VERSION, Recipe, parse_recipe
from quamba.transforms import fold_factors

NAME = "quamba"


class QuambaConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a quantised directory: a format version and the resolved recipe."""

    quant_method: Any  # transformers takes any name here, but declares an enumeration of its own

    def __init__(
        self, recipe: dict[str, Any] | None = None, format_version: int = FORMAT_VERSION, **kwargs: Any
    ) -> None:
        self.quant_method = NAME
        self.recipe = recipe or FLOAT.model_dump(mode="json")
        self.format_version = format_version
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
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
        swap(model, recipe, model.config.dtype or torch.float32, "meta")
        # a device map made by "auto" keeps blocks whole by the names of their classes
        model._no_split_modules = {*(model._no_split_modules or ()), RecurrentBlock.__name__}
        stored: Index = {}
        for file in checkpoint_files or []:
            stored |= contents(Path(file))
        for name, tensor in model.state_dict().items() if stored else ():
            # transformers would go on with zeros in the place of what is missing
            got = stored[name].shape if name in stored else None
            if got != tuple(tensor.shape):
                wanted = f"tensor {name!r} should be {list(tensor.shape)} by config and recipe"
                raise UserError(f"{wanted}, and is {'missing' if got is None else list(got)}; quantise the model again")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        waiting: tuple[str, ...] = ()
        if hasattr(model, "hf_device_map"):
            from quamba.integrations.offload import onload_whole

            waiting = tuple(f"{path}." for path in onload_whole(model, describe(model.config)))
        for name, tensor in model.state_dict().items():
            if tensor.device.type == "meta" and not name.startswith(waiting):
                raise UserError(f"the checkpoint lacks the tensor {name!r}")
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
    put(model, spec.embedding, Embedding(spec.vocab, spec.d_model, recipe.embedding, **made))
    for layer, block in enumerate(spec.blocks):
        if block.hosted:
            fit(model.get_submodule(block.path), spec, block, recipe, layer, **made)
        else:
            put(model, block.path, RecurrentBlock(spec, block, recipe, layer, **made))
    folded = folds(recipe, spec.final_norm_kind)
    if folded or not spec.hosted:
        put(model, spec.final_norm, Norm(spec.d_model, spec.eps, folded=folded, **made))
    head = Linear(spec.d_model, spec.vocab, bias=False, spec=recipe.linear("lm_head"), **made)
    put(model, spec.head, head)
    for module in model.modules():
        if isinstance(module, (LowBit, RecurrentBlock)):
            # transformers would otherwise initialise what it does not know
            module._is_hf_initialized = True


def use_operators(model: Any) -> None:
    """Let an unquantised transformers model of a known architecture run on quamba's operators, in floats."""
    if model.config.model_type not in ARCHITECTURES:
        return
    weights = model.state_dict()
    for block in describe(model.config).blocks:
        for sub in block.sublayers:
            if mixer_class(sub.mixer) is not None:
                weights = fold_factors(weights, sub.mixer, f"{block.path}.{sub.mixer.path}.")
    swap(model, FLOAT, model.dtype, model.device)
    model.load_state_dict(weights)


def register() -> None:
    """Make transformers know the format; calling it again changes nothing."""
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(NAME)(QuambaConfig)
        register_quantizer(NAME)(QuambaQuantizer)


register()
