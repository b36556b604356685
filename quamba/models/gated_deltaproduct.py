"""Gated DeltaProduct (flash-linear-attention's ``gated_deltaproduct``): several delta-rule steps per token. Siems et
al., 2502.10297."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, RATE, VALUE, axes, convolutions, decoder, mixer, post, scan_inputs
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, Axis, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan

STEP_KEY, STEP_VALUE, STEP_RATE = ("step", *KEY), ("step", *VALUE), ("step", *RATE)


def _mixer(config: Any) -> MixerSpec:
    forgets, gated = config.use_forget_gate, config.use_output_gate
    decay = Proj("a_proj", "a_proj", "residual", RESID, (Output("rate", RATE, ("softplus",)),), keep=True)
    gate = Proj("g_proj", "g_proj", "residual", RESID, (Output("z", VALUE, ("silu",)),))
    projs = (
        *((decay,) if forgets else ()),
        Proj("b_proj", "b_proj", "residual", RESID, (Output("beta", STEP_RATE, ("sigmoid",)),), keep=True),
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", KEY, post(config, "silu", "l2")),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", STEP_KEY, post(config, "silu", "l2")),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", STEP_VALUE, post(config, "silu")),)),
        *((gate,) if gated else ()),
        Proj("o_proj", "o_proj", "y", VALUE, (Output("residual", RESID),)),
    )
    beside = [*convolutions(config, q=KEY, k=STEP_KEY, v=STEP_VALUE), Param("o_norm.weight", ((("value",),),))]
    beside += [Param("A_log", ((RATE,),)), Param("dt_bias", ((RATE,),))] if forgets else []
    out = OutSite("z" if gated else None, "rms", 0, "o_norm.weight", role="o_proj")
    return mixer(
        axes(
            config, config.num_heads, 1, config.head_dim, int(config.head_dim * config.expand_v),
            Axis("step", config.num_householder, fixed=True),
        ),
        projs, beside, scan_inputs(q=KEY, k=KEY, v=VALUE), Scan("delta", "scalar"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError as decoder does."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "num_heads": 2,
    "head_dim": 16, "num_householder": 2, "use_forget_gate": True, "allow_neg_eigval": True, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="gated_deltaproduct",
    describe=describe,
    tiny=(_TINY, {**_TINY, "num_householder": 1, "use_forget_gate": False, "use_output_gate": False}),
)
