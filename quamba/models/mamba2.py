"""Mamba2 (transformers' ``mamba2``): SSD with scalar decay per head and a gated norm. Dao and Gu, 2405.21060."""

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

RESID, VALUE, STATE, HEAD, WIDTH = ("resid",), ("head", "value"), ("group", "state"), ("head",), ("width",)


def mixer(config: Any) -> MixerSpec:
    """The mixer of every layer."""
    heads, groups = config.num_heads, config.n_groups
    sizes = {
        "D": config.hidden_size, "H": heads, "P": config.head_dim, "I": heads * config.head_dim, "G": groups,
        "N": config.state_size, "W": config.conv_kernel,
    }  # fmt: skip
    axes = [
        Axis("resid", sizes["D"]), Axis("head", heads, share="group"), Axis("value", config.head_dim),
        Axis("group", groups, fixed=True), Axis("state", config.state_size),
        Axis("width", config.conv_kernel, fixed=True), Axis("one", 1, fixed=True),
    ]  # fmt: skip
    rows = (VALUE, VALUE, STATE, STATE, HEAD)
    mixed = (VALUE, STATE, STATE)
    params = [
        Param("in_proj.weight", (rows, (RESID,))),
        Param("conv1d.weight", (mixed, (("one",),), (WIDTH,))),
        Param("A_log", ((HEAD,),)),
        Param("D", ((HEAD,),)),
        Param("dt_bias", ((HEAD,),)),
        Param("norm.weight", ((VALUE,),)),
        Param("out_proj.weight", ((RESID,), (VALUE,))),
    ]
    if config.use_conv_bias:
        params.append(Param("conv1d.bias", (mixed,)))
    if config.use_bias:
        params += [Param("in_proj.bias", (rows,)), Param("out_proj.bias", ((RESID,),))]
    post = ("conv", "silu")
    projs = (
        Proj("in_proj", "in_proj", "residual", RESID,
             (Output("z", VALUE, ("silu",)), Output("x", VALUE, post), Output("B", STATE, post),
              Output("C", STATE, post), Output("rate", HEAD, ("softplus",))), config.use_bias),
        Proj("out_proj", "out_proj", "y", VALUE, (Output("residual", RESID),), config.use_bias),
    )  # fmt: skip
    inputs = (
        ScanInput("x", "scan_x", ("head", "value"), "value"),
        ScanInput("B", "scan_b", ("group", "state"), "key"),
        ScanInput("C", "scan_c", ("group", "state"), "query"),
        ScanInput("rate", "scan_dt", ("head",), "rate"),
    )
    limit = (float(config.time_step_limit[0]), float(config.time_step_limit[1]))
    return MixerSpec(
        "mixer", {a.name: a for a in axes}, tuple(params), projs, inputs, Scan("ssd", "scalar"),
        OutSite(gate="z", norm="rms", norm_groups=groups, norm_weight="norm.weight"), sizes,
        conv_bias=config.use_conv_bias, dt_limit=limit,
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
    "hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 2, "vocab_size": 96,
    "state_size": 16, "chunk_size": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="mamba2",
    describe=describe,
    tiny=(_TINY, {**_TINY, "n_groups": 2, "use_bias": True, "tie_word_embeddings": False}),
    renames=(("backbone.embedding.", "backbone.embeddings."),),
)
