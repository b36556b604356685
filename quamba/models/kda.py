"""Kimi Delta Attention (flash-linear-attention's ``kda``): the delta rule after a decay per key channel. Kimi team,
2510.26692."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import (
    KEY,
    MANY_KEYS,
    MANY_VALUES,
    RATE,
    axes,
    convolutions,
    decoder,
    mixer,
    post,
    scan_inputs,
)
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, Axis, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan

RANK, GATE_RANK = ("rank",), ("gate_rank",)


def _mixer(config: Any) -> MixerSpec:
    heads, repeat = config.num_heads, (config.num_v_heads or config.num_heads) // config.num_heads
    values = int(config.head_dim * config.expand_v)
    projs = (
        Proj("f_a_proj", "f_proj.0", "residual", RESID, (Output("f", RANK),), keep=True),
        Proj("f_b_proj", "f_proj.1", "f", RANK, (Output("rate", MANY_KEYS, ("softplus",)),), keep=True),
        Proj("b_proj", "b_proj", "residual", RESID, (Output("beta", RATE, ("sigmoid",)),), keep=True),
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", KEY, post(config, "silu", "l2")),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", KEY, post(config, "silu", "l2")),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", MANY_VALUES, post(config, "silu")),)),
        Proj("g_a_proj", "g_proj.0", "residual", RESID, (Output("g", GATE_RANK),)),
        Proj("g_b_proj", "g_proj.1", "g", GATE_RANK, (Output("z", MANY_VALUES, ("sigmoid",)),), bias=True),
        Proj("o_proj", "o_proj", "y", MANY_VALUES, (Output("residual", RESID),)),
    )
    beside = convolutions(config, q=KEY, k=KEY, v=MANY_VALUES)
    beside += [Param("A_log", ((RATE,),)), Param("dt_bias", ((MANY_KEYS,),)), Param("o_norm.weight", ((("value",),),))]
    named = axes(
        config, heads, repeat, config.head_dim, values, Axis("rank", values), Axis("gate_rank", values)
    )
    return mixer(
        named, projs, beside, scan_inputs(q=KEY, k=KEY, v=MANY_VALUES), Scan("delta", "diagonal"),
        OutSite("z", "rms", 0, "o_norm.weight", role="o_proj"),
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError as decoder does."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "num_heads": 2,
    "num_v_heads": 4, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="kda",
    describe=describe,
    tiny=(_TINY, {**_TINY, "num_v_heads": None, "expand_v": 2.0, "use_short_conv": False, "lower_bound": -5.0}),
)
