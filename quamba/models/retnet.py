"""RetNet (flash-linear-attention's ``retnet``): a fixed decay per head, rotary positions. Sun et al., 2307.08621."""

from __future__ import annotations

from typing import Any

from quamba.models.linear_attention import KEY, MANY_KEYS, MANY_VALUES, VALUE, axes, decoder, mixer, scan_inputs
from quamba.models.parts import RESID
from quamba.models.spec import Architecture, MixerSpec, ModelSpec, Output, OutSite, Param, Proj, Scan


def _mixer(config: Any) -> MixerSpec:
    heads = config.num_kv_heads or config.num_heads
    keys, values = config.whole("expand_k") // config.num_heads, config.whole("expand_v") // config.num_heads
    turned, gated = (*((config.feature_map,) if config.feature_map else ()), "rope"), config.use_output_gate
    projs = (
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", MANY_KEYS, turned),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", KEY, turned),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", VALUE),)),
        *((Proj("g_proj", "g_proj", "residual", RESID, (Output("z", MANY_VALUES, ("silu",)),)),) if gated else ()),
        Proj("o_proj", "o_proj", "y", MANY_VALUES, (Output("residual", RESID),)),
    )
    norm = "g_norm_swish_gate.weight" if gated and config.fuse_norm else "g_norm.weight"
    beside = [Param(norm, ((("value",),),))] if config.elementwise_affine else []
    out = OutSite("z" if gated else None, "rms", 0, norm if config.elementwise_affine else None, role="o_proj")
    return mixer(
        # the decay of a head is told by its place, the frequency of a pair of keys as well
        axes(config, heads, config.num_heads // heads, keys, values, fixed=("kv_head", "repeat", "key")),
        projs, beside, scan_inputs(q=MANY_KEYS, k=MANY_KEYS, v=MANY_VALUES), Scan("gla", "scalar"), out,
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for sizes that the heads do not divide."""
    return decoder(config, lambda layer: _mixer(config))


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 96, "num_heads": 4,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="retnet",
    describe=describe,
    tiny=(_TINY, {**_TINY, "num_kv_heads": 2, "use_output_gate": False}),
)  # fmt: skip
