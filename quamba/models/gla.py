"""Gated linear attention (flash-linear-attention's ``gla``): a decay per key channel. Yang et al., 2312.06635."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import (
    KEY,
    MANY_KEYS,
    MANY_VALUES,
    VALUE,
    axes,
    convolutions,
    decoder,
    mixer,
    post,
    scan_inputs,
)
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, Axis, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan


def _mixer(config: Any) -> MixerSpec:
    heads = config.num_kv_heads or config.num_heads
    keys, values = config.whole("expand_k") // config.num_heads, config.whole("expand_v") // config.num_heads
    act, gated = ("silu",) if config.use_short_conv else (), config.use_output_gate
    mapped = (config.feature_map,) if config.feature_map else ()
    projs = (
        Proj("gk_a_proj", "gk_proj.0", "residual", RESID, (Output("gk", ("rank",)),), keep=True),
        Proj("gk_b_proj", "gk_proj.1", "gk", ("rank",), (Output("rate", KEY, ("sigmoid",)),), bias=True, keep=True),
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", MANY_KEYS, post(config, *act, *mapped)),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", KEY, post(config, *act, *mapped)),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", VALUE, post(config, *act)),)),
        *((Proj("g_proj", "g_proj", "residual", RESID, (Output("z", MANY_VALUES, ("silu",)),)),) if gated else ()),
        Proj("o_proj", "o_proj", "y", MANY_VALUES, (Output("residual", RESID),)),
    )
    norm = "g_norm_swish_gate.weight" if gated and config.fuse_norm else "g_norm.weight"
    beside = convolutions(config, q=MANY_KEYS, k=KEY, v=VALUE)
    beside += [Param(norm, ((("value",),),))] if config.elementwise_affine else []
    out = OutSite("z" if gated else None, "rms", 0, norm if config.elementwise_affine else None, role="o_proj")
    return mixer(
        axes(config, heads, config.num_heads // heads, keys, values, Axis("rank", config.gate_rank)),
        projs, beside, scan_inputs(q=MANY_KEYS, k=MANY_KEYS, v=MANY_VALUES), Scan("gla", "diagonal"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for sizes that the heads do not divide."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 96, "intermediate_size": 96, "num_heads": 4,
    "num_kv_heads": 2, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True},
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="gla",
    describe=describe,
    tiny=(_TINY, {**_TINY, "attn": None, "num_hidden_layers": 2, "use_output_gate": False, "feature_map": "swish",
                  "elementwise_affine": False},
          {**_TINY, "attn": None, "num_hidden_layers": 2, "use_short_conv": True, "fuse_norm": False}),
)  # fmt: skip
