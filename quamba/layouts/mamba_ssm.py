"""What mamba_ssm's save_pretrained writes, as the public state-spaces models come: config.json with d_model and
n_layer, pytorch_model.bin. Settings and defaults are those of mamba_ssm 2.3 (MambaConfig, Mamba, Mamba2)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from transformers import Mamba2Config, MambaConfig

from quamba.errors import UserError
from quamba.layouts import huggingface
from quamba.layouts.layout import Index, Layout, made, read_json

OLD_EMBEDDING, EMBEDDING = "backbone.embedding.weight", "backbone.embeddings.weight"
EPS = 1e-5
"""Of every norm; no setting changes it."""


class _Settings(BaseModel):
    """Unknown keys are refused, and a Literal is the one value that transformers' mamba and mamba2 can represent.
    Any is what says how training begins or how fast it runs, not what is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Mixer(_Settings):
    d_conv: PositiveInt = 4
    bias: bool = False
    conv_bias: bool = True
    dt_min: Any = None
    dt_max: Any = None
    dt_init_floor: Any = None


class Mamba1(_Mixer):
    """ssm_cfg of a layer of Mamba1."""

    layer: Literal["Mamba1"] = "Mamba1"
    d_state: PositiveInt = 16
    expand: PositiveInt = 2
    dt_rank: Literal["auto"] | PositiveInt = "auto"
    dt_init: Any = None
    dt_scale: Any = None
    use_fast_path: Any = None


class Mamba2(_Mixer):
    """ssm_cfg of a layer of Mamba2."""

    layer: Literal["Mamba2"]
    d_state: PositiveInt = 128
    expand: PositiveInt = 2
    headdim: PositiveInt = 64
    ngroups: PositiveInt = 1
    dt_limit: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.0, float("inf")]
    chunk_size: PositiveInt = 256
    d_ssm: PositiveInt | None = None
    D_has_hdim: Literal[False] = False
    rmsnorm: Literal[True] = True
    norm_before_gate: Literal[False] = False
    process_group: None = None
    conv_init: Any = None
    A_init_range: Any = None
    use_mem_eff_path: Any = None
    sequence_parallel: Any = None


LAYERS = ("Mamba1", "Mamba2")


class Model(_Settings):
    """The whole config.json. vocab_size is what the tokenizer has; the tables are padded to a multiple."""

    d_model: PositiveInt
    n_layer: PositiveInt
    vocab_size: PositiveInt
    ssm_cfg: Annotated[Mamba1 | Mamba2, Field(discriminator="layer")] = Mamba1()
    d_intermediate: Literal[0] = 0
    attn_layer_idx: Annotated[list[int], Field(max_length=0)] | None = None
    attn_cfg: Any = None
    rms_norm: Literal[True] = True
    residual_in_fp32: bool = True
    fused_add_norm: Any = None
    pad_vocab_size_multiple: PositiveInt = 8
    tie_embeddings: bool = True


def matches(path: Path) -> bool:
    """A config.json that names no model type, but d_model and n_layer."""
    file = path / "config.json"
    if not file.is_file():
        return False
    held = read_json(file)
    return "model_type" not in held and {"d_model", "n_layer"} <= set(held)


def settings(path: Path) -> Model:
    """What config.json says. Raises UserError for a setting that is unknown or cannot be represented."""
    file = path / "config.json"
    held = read_json(file)
    mixer = held.get("ssm_cfg") or {}
    if isinstance(mixer, dict):
        held["ssm_cfg"] = {"layer": "Mamba1", **mixer}
    try:
        return Model(**held)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic also names the member of a union that it tried
        where = ".".join(str(part) for part in first["loc"] if part not in LAYERS and "[" not in str(part))
        if first["type"] == "extra_forbidden":
            raise UserError(f"{file} has the unknown key {where!r}, so what it stands for cannot be computed") from None
        raise UserError(f"{file}: {where} cannot be {first['input']!r} here: {first['msg']}") from None


def config(path: Path) -> Any:
    """Raises UserError as ``settings`` and ``index`` do, and for sizes that do not fit each other."""
    file, model, tensors = path / "config.json", settings(path), index(path)
    if EMBEDDING not in tensors:
        raise UserError(f"the weights of {path} lack an embedding, so they are no language model")
    mixer = model.ssm_cfg
    shared = {
        "vocab_size": -(-model.vocab_size // model.pad_vocab_size_multiple) * model.pad_vocab_size_multiple,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layer,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.expand,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": EPS,
        "residual_in_fp32": model.residual_in_fp32,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": tensors[EMBEDDING].read().dtype,
    }
    if isinstance(mixer, Mamba1):
        return made(MambaConfig, file, time_step_rank=mixer.dt_rank, **shared)
    inner = mixer.expand * model.d_model
    heads = inner // mixer.headdim
    if mixer.d_ssm not in (None, inner):
        raise UserError(f"{file}: ssm_cfg.d_ssm cannot be {mixer.d_ssm} here, only expand * d_model = {inner}")
    if heads % mixer.ngroups:
        raise UserError(f"{file}: ssm_cfg.ngroups cannot be {mixer.ngroups} here, which does not divide {heads} heads")
    return made(
        Mamba2Config, file, num_heads=heads, head_dim=mixer.headdim, n_groups=mixer.ngroups,
        time_step_limit=tuple(mixer.dt_limit), chunk_size=mixer.chunk_size, **shared,
    )  # fmt: skip


def index(path: Path) -> Index:
    """The tensors under transformers' names; a tied head is left out, as it is the embedding."""
    found = {EMBEDDING if name == OLD_EMBEDDING else name: s for name, s in huggingface.index(path).items()}
    if settings(path).tie_embeddings:
        found.pop("lm_head.weight", None)
    return found


LAYOUT = Layout(
    name="mamba_ssm",
    sign="a config.json with d_model and n_layer (mamba_ssm)",
    matches=matches,
    config=config,
    index=index,
    tokenizer="EleutherAI/gpt-neox-20b",
)
