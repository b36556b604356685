"""RWKV7 (flash-linear-attention's ``rwkv7``): a diagonal plus rank-one transition; every projection reads its own
mixture of a token with the one before, and values are drawn to those of the first layer. Peng et al., 2503.14456."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, VALUE, axes, decoder, mixer, scan_inputs
from quamba.models.parts import ONE, RESID, weights
from quamba.models.spec import Architecture, Axis, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan, Segment


def _low_rank(name: str, output: Output, step: str | None, *, bias: bool = True) -> tuple[Proj, Proj]:
    """The two projections of a low-rank gate."""
    rank: Segment = (f"{name}_rank",)
    down = Output(f"{name}_low", rank, (step,) if step else ())
    return (
        Proj(f"{name}_a_proj", f"{name}_lora.lora.0", f"mixed_{name}", RESID, (down,), keep=True),
        Proj(f"{name}_b_proj", f"{name}_lora.lora.2", f"{name}_low", rank, (output,), bias=bias, keep=True),
    )


def _mixer(config: Any, layer: int) -> MixerSpec:
    heads, keys = config.num_heads, config.head_dim
    ranks = {"w": config.decay_low_rank_dim, "a": config.a_low_rank_dim, "g": config.gate_low_rank_dim}
    drawn: tuple[Proj, ...] = ()
    if layer:
        ranks["v"] = config.v_low_rank_dim
        drawn = _low_rank("v", Output("share", VALUE, ("sigmoid",)), None)
    projs = (
        *_low_rank("w", Output("rate", KEY, ("sigmoid",)), "tanh"),
        *_low_rank("a", Output("a", KEY, ("sigmoid",)), None),
        *drawn,
        *_low_rank("g", Output("z", VALUE), "sigmoid", bias=False),
        Proj("r_proj", "r_proj", "mixed_r", RESID, (Output("q", KEY),)),
        Proj("k_proj", "k_proj", "mixed_k", RESID, (Output("k", KEY, ("rate",)),)),
        Proj("v_proj", "v_proj", "mixed_v", RESID, (Output("v", VALUE, ("lerp",)),)),
        Proj("o_proj", "o_proj", "y", VALUE, (Output("residual", RESID),)),
    )
    beside = [Param(f"x_{name}", ((ONE,), (ONE,), (RESID,))) for name in "rwkvag"]
    beside += [Param(name, ((KEY,),)) for name in ("k_k", "k_a")] + [Param("r_k", ((("kv_head",),), (("key",),)))]
    beside += [Param(f"g_norm.{leaf}", ((VALUE,),)) for leaf in ("weight", "bias")]
    more = [Axis(f"{name}_rank", size) for name, size in ranks.items()]
    return mixer(
        # the first layer's values enter all others, so no layer can change the order of its own alone
        axes(config, heads, 1, keys, config.value_dim[layer] // heads, *more, fixed=("kv_head", "value")),
        projs, beside, scan_inputs(q=KEY, k=KEY, v=VALUE), Scan("dplr", "diagonal"),
        OutSite("z", "group", 0, "g_norm.weight", role="o_proj"),
    )  # fmt: skip


def _channel_mix(config: Any) -> MixerSpec:
    channel = ("hidden",)
    projs = (
        Proj("up_proj", "key", "mixed_key", RESID, (Output("up", channel, ("relu", "square")),)),
        Proj("down_proj", "value", "hidden", channel, (Output("residual", RESID),)),
    )
    named = {a.name: a for a in (Axis("resid", config.hidden_size), Axis("hidden", config.mlp_size))}
    params = (*weights(projs), Param("x_k", ((RESID,),)))
    return MixerSpec("ffn", named, params, projs, out=OutSite(None, None, role="down_proj"))


def describe(config: Any) -> ModelSpec:
    """The mixtures per channel, and a LayerNorm, keep the residual stream from rotating."""
    return decoder(config, lambda layer: _mixer(config, layer), after=_channel_mix(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 96, "intermediate_size": 96, "head_dim": 16,
    "decay_low_rank_dim": 8, "gate_low_rank_dim": 16, "a_low_rank_dim": 8, "v_low_rank_dim": 8, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="rwkv7",
    describe=describe,
    tiny=(_TINY, {**_TINY, "num_hidden_layers": 2, "norm_bias": False, "fuse_norm": False}),
)
