"""DeltaNet (flash-linear-attention's ``delta_net``): the delta rule without decay. Yang et al., 2406.06484."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, RATE, VALUE, axes, convolutions, decoder, mixer, post, scan_inputs
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan


def _mixer(config: Any) -> MixerSpec:
    heads = config.num_heads
    acts = () if config.qk_activation == "identity" else (config.qk_activation,)
    key = post(config, *acts, "l2" if config.qk_norm == "l2" else "l1")
    rate = Proj("b_proj", "b_proj", "residual", RESID, (Output("beta", RATE, ("sigmoid",)),), keep=True)
    gate = Proj("g_proj", "g_proj", "residual", RESID, (Output("z", VALUE, ("silu",)),))
    projs = (
        *((rate,) if config.use_beta else ()),
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", KEY, key),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", KEY, key),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", VALUE, post(config, "silu")),)),
        *((gate,) if config.use_gate else ()),
        Proj("o_proj", "o_proj", "y", VALUE, (Output("residual", RESID),)),
    )
    beside = [*convolutions(config, q=KEY, k=KEY, v=VALUE), Param("o_norm.weight", ((("value",),),))]
    out = OutSite("z" if config.use_gate else None, "rms", 0, "o_norm.weight", role="o_proj")
    return mixer(
        axes(config, heads, 1, config.whole("expand_k") // heads, config.whole("expand_v") // heads), projs, beside,
        scan_inputs(q=KEY, k=KEY, v=VALUE), Scan("delta", "scalar"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for sizes that the heads do not divide."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "num_heads": 4,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="delta_net",
    describe=describe,
    tiny=(_TINY, {**_TINY, "use_short_conv": False, "qk_activation": "identity", "use_gate": True, "use_beta": False}),
)
