"""LightNet (flash-linear-attention's ``lightnet``): keys normalised by all keys so far, which is also their decay. Qin
et al., 2405.21022."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, VALUE, axes, convolutions, decoder, mixer, post, scan_inputs
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, Axis, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan

GATE_RANK = ("gate_rank",)


def _mixer(config: Any) -> MixerSpec:
    heads, keys = config.heads_and_size
    projs = (
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", KEY, post(config, "silu")),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", KEY, post(config, "softmax")),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", VALUE, post(config)),)),
        Proj("g_a_proj", "g_proj.0", "residual", RESID, (Output("g", GATE_RANK),)),
        Proj("g_b_proj", "g_proj.1", "g", GATE_RANK, (Output("z", VALUE, ("silu",)),)),
        Proj("o_proj", "o_proj", "y", VALUE, (Output("residual", RESID),)),
    )
    beside = convolutions(config, q=KEY, k=KEY, v=VALUE)
    beside += [Param("g_norm.weight", ((VALUE,),))] if config.elementwise_affine else []
    out = OutSite("z", "rms", 0, "g_norm.weight" if config.elementwise_affine else None, role="o_proj")
    gate = Axis("gate_rank", config.gate_low_rank_dim)
    return mixer(
        axes(config, heads, 1, keys, config.hidden_size // heads, gate), projs, beside,
        # keys become ever smaller shares of a growing sum, which no static scale suits
        scan_inputs(q=KEY, v=VALUE), Scan("gla", "diagonal"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for a config that gives neither heads nor their size."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "expand_ratio": 16,
    "gate_low_rank_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="lightnet",
    describe=describe,
    tiny=(_TINY, {**_TINY, "use_short_conv": True, "expand_ratio": None, "num_heads": 2, "elementwise_affine": False}),
)
