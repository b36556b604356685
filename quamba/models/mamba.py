"""Mamba1 (transformers' ``mamba``): a diagonal selective scan over d_inner channels. Gu and Dao, 2312.00752."""

from __future__ import annotations

from typing import Any

from quamba.models.spec import (
    Architecture,
    Axis,
    BlockSpec,
    MixerSpec,
    ModelSpec,
    Output,
    OutSite,
    Param,
    Proj,
    Scan,
    ScanInput,
    Sublayer,
    require,
)  # fmt: skip

CHANNEL, RESID, STATE, RANK, WIDTH = ("channel",), ("resid",), ("state",), ("rank",), ("width",)


def mixer(config: Any) -> MixerSpec:
    """The mixer of every layer."""
    sizes = {
        "D": config.hidden_size, "I": config.intermediate_size, "N": config.state_size, "W": config.conv_kernel,
        "R": int(config.time_step_rank), "G": 1,
    }  # fmt: skip
    axes = [
        Axis("resid", sizes["D"]), Axis("channel", sizes["I"]), Axis("state", sizes["N"]), Axis("rank", sizes["R"]),
        Axis("width", sizes["W"], fixed=True), Axis("one", 1, fixed=True),
    ]  # fmt: skip
    inner = (CHANNEL,)
    params = [
        Param("in_proj.weight", ((CHANNEL, CHANNEL), (RESID,))),
        Param("conv1d.weight", (inner, (("one",),), (WIDTH,))),
        Param("x_proj.weight", ((RANK, STATE, STATE), inner)),
        Param("dt_proj.weight", (inner, (RANK,))),
        Param("dt_proj.bias", (inner,)),
        Param("A_log", (inner, (STATE,))),
        Param("D", (inner,)),
        Param("out_proj.weight", ((RESID,), inner)),
    ]
    if config.use_conv_bias:
        params.append(Param("conv1d.bias", (inner,)))
    if config.use_bias:
        params += [Param("in_proj.bias", ((CHANNEL, CHANNEL),)), Param("out_proj.bias", ((RESID,),))]
    projs = (
        Proj("in_proj", "in_proj", "residual", RESID,
             (Output("x", CHANNEL, ("conv", "silu")), Output("z", CHANNEL, ("silu",))), config.use_bias),
        Proj("x_proj", "x_proj", "x", CHANNEL, (Output("dt", RANK), Output("B", STATE), Output("C", STATE))),
        Proj("dt_proj", "dt_proj", "dt", RANK, (Output("rate", CHANNEL, ("softplus",)),), True),
        Proj("out_proj", "out_proj", "y", CHANNEL, (Output("residual", RESID),), config.use_bias),
    )  # fmt: skip
    inputs = (
        ScanInput("x", "scan_x", ("channel",), "value"),
        ScanInput("B", "scan_b", ("state",), "key"),
        ScanInput("C", "scan_c", ("state",), "query"),
        ScanInput("rate", "scan_dt", ("channel",), "rate"),
    )
    return MixerSpec(
        "mixer", {a.name: a for a in axes}, tuple(params), projs, inputs, Scan("selective", "diagonal"),
        OutSite(gate="z", norm=None), sizes, conv_bias=config.use_conv_bias,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    shared = mixer(config)
    blocks = tuple(
        BlockSpec(f"backbone.layers.{i}", (Sublayer("norm", shared),)) for i in range(config.num_hidden_layers)
    )
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.layer_norm_epsilon, "backbone.embeddings", blocks,
        "backbone.norm_f", "lm_head", config.residual_in_fp32,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8,
    "time_step_rank": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="mamba",
    describe=describe,
    tiny=(_TINY, {**_TINY, "use_bias": True, "tie_word_embeddings": False}),
    renames=(("backbone.embedding.", "backbone.embeddings."),),
)
