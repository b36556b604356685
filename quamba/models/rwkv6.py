"""RWKV6 (flash-linear-attention's ``rwkv6``): a decay per key channel, a bonus for the current token; every projection
reads its own mixture of a token with the one before, which depends on the data. Peng et al., 2404.05892."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, VALUE, axes, decoder, mixer, scan_inputs
from quamba.models.parts import RESID, weights
from quamba.models.spec import Architecture, Axis, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan

MIXTURES, RANK = ("mixture",), ("mixture", "rank")
DECAY_RANK = ("decay_rank",)


def _mixer(config: Any) -> MixerSpec:
    heads = config.num_heads
    projs = (
        Proj("mix_a_proj", "x_proj.0.linear", "mixed", RESID, (Output("mix", RANK, ("tanh",)),), keep=True),
        Proj("mix_b_proj", "x_proj.2", "mix", RANK, (Output("mixture", RESID),), keep=True),
        Proj("w_a_proj", "w_proj.linear.lora.0", "mixed_w", RESID, (Output("w", DECAY_RANK, ("tanh",)),), keep=True),
        Proj(
            "w_b_proj", "w_proj.linear.lora.2", "w", DECAY_RANK, (Output("rate", KEY, ("exp",)),), bias=True, keep=True
        ),
        Proj("r_proj", "r_proj.linear", "mixed_r", RESID, (Output("q", KEY),)),
        Proj("k_proj", "k_proj.linear", "mixed_k", RESID, (Output("k", KEY),)),
        Proj("v_proj", "v_proj.linear", "mixed_v", RESID, (Output("v", VALUE),)),
        Proj("g_proj", "g_proj.linear", "mixed_g", RESID, (Output("z", VALUE, ("silu",)),)),
        Proj("o_proj", "o_proj", "y", VALUE, (Output("residual", RESID),)),
    )
    beside = [
        Param("x_proj.0.mu", ((RESID,),)), Param("x_bias", ((MIXTURES,), (RESID,))),
        Param("bonus", ((("kv_head",),), (("key",),))), Param("g_norm.weight", ((VALUE,),)),
        Param("g_norm.bias", ((VALUE,),)),
    ]  # fmt: skip
    more = (
        Axis("mixture", 5, fixed=True), Axis("rank", config.proj_low_rank_dim),
        Axis("decay_rank", config.gate_low_rank_dim),
    )  # fmt: skip
    return mixer(
        axes(config, heads, 1, config.whole("expand_k") // heads, config.whole("expand_v") // heads, *more),
        projs, beside, scan_inputs(q=KEY, k=KEY, v=VALUE), Scan("gla", "diagonal"),
        OutSite("z", "group", 0, "g_norm.weight", role="o_proj"),
    )  # fmt: skip


def _channel_mix(config: Any) -> MixerSpec:
    channel = ("hidden",)
    projs = (
        Proj("up_proj", "key.linear", "mixed_key", RESID, (Output("up", channel, ("relu", "square")),)),
        Proj("gate_proj", "receptance.linear", "mixed_receptance", RESID, (Output("gate", RESID, ("sigmoid",)),)),
        Proj("down_proj", "value", "hidden", channel, (Output("residual", RESID),)),
    )
    params = (*weights(projs), *(Param(f"{name}.mu", ((RESID,),)) for name in ("key", "receptance")))
    named = {a.name: a for a in (Axis("resid", config.hidden_size), Axis("hidden", config.mlp_size))}
    return MixerSpec("ffn", named, params, projs, out=OutSite(None, None, role="down_proj"))


def describe(config: Any) -> ModelSpec:
    """The mixtures per channel, and a LayerNorm, keep the residual stream from rotating. Raises UserError for sizes
    that the heads do not divide."""
    return decoder(config, lambda layer: _mixer(config), after=_channel_mix(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "num_heads": 4,
    "proj_low_rank_dim": 8, "gate_low_rank_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="rwkv6",
    describe=describe,
    tiny=(_TINY, {**_TINY, "norm_bias": False, "norm_first": False, "attn": {"layers": [1], "num_heads": 4}}),
)
