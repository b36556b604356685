"""HGRN (flash-linear-attention's ``hgrn``): an elementwise recurrence whose forget gates have a least value in every
layer. Qin et al., 2311.04823."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import convolutions, decoder, mixer, post, scan_inputs, small
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, Axis, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan

CHANNEL = ("channel",)


def _mixer(config: Any) -> MixerSpec:
    # the table of least forget gates belongs to all layers, so no layer can change the order of its channels alone
    channel = Axis("channel", config.whole("expand_ratio"), fixed=config.lower_bounds is not None)
    projs = (
        Proj("i_proj", "i_proj", "residual", RESID, (Output("v", CHANNEL, post(config, "silu", "rate")),)),
        Proj("f_proj", "f_proj", "residual", RESID, (Output("rate", CHANNEL, post(config, "sigmoid")),)),
        Proj("g_proj", "g_proj", "residual", RESID, (Output("z", CHANNEL, ("silu",)),)),
        Proj("o_proj", "o_proj", "y", CHANNEL, (Output("residual", RESID),)),
    )
    beside = convolutions(config, i=CHANNEL, f=CHANNEL)
    beside += [Param("g_norm.weight", ((CHANNEL,),))] if config.elementwise_affine else []
    out = OutSite("z", "rms", 0, "g_norm.weight" if config.elementwise_affine else None, role="o_proj")
    return mixer(
        [Axis("resid", config.hidden_size), channel, *small(config)], projs, beside, scan_inputs(v=CHANNEL),
        Scan("elementwise", "diagonal"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for a width that is no whole number."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "expand_ratio": 1.5,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="hgrn", describe=describe, tiny=(_TINY, {**_TINY, "use_lower_bound": False, "use_short_conv": True})
)
