"""Open a model, original or quantised, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from quamba import layouts
from quamba.arena import settle
from quamba.checkpoint import FLOATS, Checkpoint, resolve
from quamba.errors import UserError
from quamba.integrations import transformers as integration
from quamba.layouts import Index
from quamba.layouts.limits import check_sizes
from quamba.models import ARCHITECTURES
from quamba.pretrained import UNREADABLE, sentence
from quamba.tokenizer import adopt, open_tokenizer


def pick_device(name: str) -> torch.device:
    """"auto" (a GPU where there is one), "cpu" or "cuda". Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch sees no GPU here; use --device cpu")
    return device


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    offload_folder: str | Path | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hub id, a directory (original or quantised) or an embedded checkpoint, in eval mode.

    tokenizer: a directory, a Hub id or a SentencePiece file; None takes the checkpoint's own.
    dtype: of activations and of unquantised weights; None takes the checkpoint's. An original checkpoint of a known
    architecture runs on the same operators, in floats.

    device_map: in the place of device, as transformers takes it ("auto", or a device or "disk" for every part), for a
    model larger than one device; an original then keeps transformers' own modules, and a part on "disk" stays in the
    checkpoint's files until it runs, or in ``offload_folder`` where transformers must convert it first. accelerate
    comes with quamba[eval].

    Raises UserError for what cannot be opened.
    """
    path, where = resolve(source), pick_device(device)
    layout = layouts.find(path)
    index = layout.index(path)
    check_sizes(path, len(index))
    config = layout.config(path)
    original = getattr(config, "quantization_config", None) is None
    if original and config.model_type in ARCHITECTURES:
        Checkpoint(source).check()
    opened = open_tokenizer(path, layout, tokenizer)
    if device_map is not None:
        if not layout.native:
            raise UserError(f"{path} is not in Hugging Face's layout, which a device map needs; load it without one")
        model = native(path, config, dtype, device_map=device_map, offload_folder=offload_folder).eval()
        check_finite(path, model, index)
        return model, opened
    model = native(path, config, dtype) if layout.native else converted(path, index, config, opened, dtype)
    check_finite(path, model, index)
    if original:
        integration.use_operators(model)
    model = model.to(where).eval()
    settle(model)
    return model, opened


def check_finite(path: Path, model: Any, index: Index) -> None:
    """Raises UserError for NaN or Inf in what the checkpoint gave the model: codes would hide it. What waits on the
    disk is not looked at."""
    given = {**dict(model.named_parameters()), **{n: t for n, t in model.state_dict().items() if n in index}}
    for name, tensor in given.items():
        looked_at = tensor.dtype in FLOATS and tensor.numel() and not tensor.is_meta
        if looked_at and not all(edge.isfinite() for edge in tensor.aminmax()):
            raise UserError(f"tensor {name!r} of {path} holds NaN or Inf; download or quantise it again")


def native(path: Path, config: Any, dtype: torch.dtype | None, **options: Any) -> Any:
    """A directory that transformers opens itself. Raises UserError when it does not, or lacks a tensor."""
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **options
        )
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be opened: {sentence(error)}") from error
    model, found = opened
    for name in sorted(found["missing_keys"]):  # transformers would go on with random values
        raise UserError(f"{path} lacks the tensor {name!r}, which a {config.model_type} model needs")
    return model


def converted(path: Path, index: Index, config: Any, tokenizer: Any, dtype: torch.dtype | None) -> Any:
    """transformers' model of the config that another layout stands for, with its tensors.

    Raises UserError when the tensors are not those that the model needs.
    """
    adopt(config, tokenizer)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    state = {name: stored.read() for name, stored in index.items()}
    model, info = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype or config.dtype, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    for what, names in (("lacks", info["missing_keys"]), ("holds the unknown tensor", info["unexpected_keys"])):
        if names:
            raise UserError(f"{path} {what} {sorted(names)[0]!r}, by its config")
    if info["mismatched_keys"]:
        name, got, wanted = sorted(info["mismatched_keys"])[0]
        raise UserError(f"tensor {name} of {path} should be {list(wanted)} by its config, is {list(got)}")
    return model
