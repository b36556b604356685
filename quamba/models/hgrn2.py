"""HGRN2 (flash-linear-attention's ``hgrn2``): keys are what the forget gates leave; nothing gates the output. Qin et
al., 2404.07904."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, VALUE, axes, convolutions, decoder, mixer, post, scan_inputs
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan


def _mixer(config: Any) -> MixerSpec:
    heads, keys = config.num_heads, config.expand_ratio
    projs = (
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", KEY, post(config, "silu")),)),
        Proj("f_proj", "f_proj", "residual", RESID, (Output("k", KEY, post(config, "sigmoid")),)),
        Proj("i_proj", "i_proj", "residual", RESID, (Output("v", VALUE, post(config)),)),
        Proj("o_proj", "o_proj", "y", VALUE, (Output("residual", RESID),)),
    )
    beside = convolutions(config, q=KEY, f=KEY, i=VALUE)
    beside += [Param("g_norm.weight", ((VALUE,),))] if config.elementwise_affine else []
    # the table of least forget gates belongs to all layers, so no layer can change the order of its keys alone
    fixed = () if config.lower_bounds is None else ("kv_head", "key")
    out = OutSite(None, "rms", 0, "g_norm.weight" if config.elementwise_affine else None, role="o_proj")
    return mixer(
        axes(config, heads, 1, keys, config.hidden_size // heads, fixed=fixed), projs, beside,
        scan_inputs(q=KEY, k=KEY, v=VALUE), Scan("gla", "diagonal"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError as decoder does."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "expand_ratio": 16,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="hgrn2", describe=describe, tiny=(_TINY, {**_TINY, "use_lower_bound": False, "use_short_conv": True})
)
