"""Gated DeltaNet (flash-linear-attention's ``gated_deltanet``): the delta rule after a decay per head. Yang et al.,
2412.06464."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, MANY_VALUES, RATE, axes, convolutions, decoder, mixer, post, scan_inputs
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan


def _mixer(config: Any) -> MixerSpec:
    heads, repeat = config.num_heads, (config.num_v_heads or config.num_heads) // config.num_heads
    gate = Proj("g_proj", "g_proj", "residual", RESID, (Output("z", MANY_VALUES, (config.output_gate_activation,)),))
    projs = (
        Proj("a_proj", "a_proj", "residual", RESID, (Output("rate", RATE, ("softplus",)),), keep=True),
        Proj("b_proj", "b_proj", "residual", RESID, (Output("beta", RATE, ("sigmoid",)),), keep=True),
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", KEY, post(config, "silu", "l2")),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", KEY, post(config, "silu", "l2")),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", MANY_VALUES, post(config, "silu")),)),
        *((gate,) if config.use_gate else ()),
        Proj("o_proj", "o_proj", "y", MANY_VALUES, (Output("residual", RESID),)),
    )
    beside = convolutions(config, q=KEY, k=KEY, v=MANY_VALUES)
    beside += [Param("A_log", ((RATE,),)), Param("dt_bias", ((RATE,),)), Param("o_norm.weight", ((("value",),),))]
    out = OutSite("z" if config.use_gate else None, "rms", 0, "o_norm.weight", role="o_proj")
    return mixer(
        axes(config, heads, repeat, config.head_dim, int(config.head_dim * config.expand_v)), projs, beside,
        scan_inputs(q=KEY, k=KEY, v=MANY_VALUES), Scan("delta", "scalar"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError as decoder does."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "num_heads": 2,
    "num_v_heads": 4, "head_dim": 16, "expand_v": 1.0, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_HYBRID = {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 8}, "num_v_heads": None}

ARCH = Architecture(
    model_type="gated_deltanet",
    describe=describe,
    tiny=(_TINY, {**_TINY, **_HYBRID, "use_gate": False, "use_short_conv": False, "allow_neg_eigval": True}),
)
