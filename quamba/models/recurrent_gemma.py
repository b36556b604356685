"""RecurrentGemma (transformers' ``recurrent_gemma``): a gated linear recurrence (RG-LRU) or local attention, an MLP
after each. The recurrence stays transformers', which keeps its state inside the module. De et al., 2402.19427."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import ONE, RESID, WIDTH, attention, mlp
from quamba.models.spec import (
    Architecture,
    Axis,
    BlockSpec,
    MixerSpec,
    ModelSpec,
    Output,
    OutSite,
    Param,
    Proj,
    Scan,
    ScanInput,
    Sublayer,
)  # fmt: skip


def _recurrent(config: Any) -> MixerSpec:
    heads = config.num_attention_heads
    axes = [
        Axis("resid", config.hidden_size), Axis("head", heads), Axis("value", config.lru_width // heads),
        Axis("width", config.conv1d_width, fixed=True), Axis("one", 1, fixed=True),
    ]  # fmt: skip
    channel, value = ("head", "value"), ("value",)
    projs = (
        Proj("linear_y", "linear_y", "residual", RESID, (Output("gate", channel, ("act",)),), True),
        Proj("linear_x", "linear_x", "residual", RESID, (Output("x", channel, ("conv",)),), True),
        Proj("linear_out", "linear_out", "y", channel, (Output("residual", RESID),), True),
    )
    params = [Param(f"{p.path}.weight", (tuple(o.segment for o in p.outputs), (p.input,))) for p in projs]
    params += [Param(f"{p.path}.bias", (tuple(o.segment for o in p.outputs),)) for p in projs]
    params += [
        Param("conv_1d.weight", ((channel,), (ONE,), (WIDTH,))),
        Param("conv_1d.bias", ((channel,),)),
        Param("rg_lru.recurrent_param", ((channel,),)),
    ]
    for gate in ("input_gate", "recurrent_gate"):
        params += [Param(f"rg_lru.{gate}_weight", ((("head",),), (value,), (value,)))]
        params += [Param(f"rg_lru.{gate}_bias", ((("head",),), (value,)))]
    out = OutSite("gate", None, role="linear_out")
    inputs = (ScanInput("x", "scan_x", channel, "value", at=("rg_lru", "activations")),)
    return MixerSpec(
        "temporal_block", {a.name: a for a in axes}, tuple(params), projs, inputs, Scan("rg_lru", "diagonal"), out
    )


def describe(config: Any) -> ModelSpec:
    """The recurrence is as wide as the residual stream in transformers' code, whatever lru_width says."""
    width, heads = config.hidden_size, config.num_attention_heads
    local = attention(
        "temporal_block", width, heads, config.num_key_value_heads, config.head_dim, rope=True,
        bias=config.attention_bias, out_bias=True,
    )  # fmt: skip
    recurrent = _recurrent(config)
    # Both spellings of the kinds: transformers renamed them between 5.17 and 5.23.
    kinds = {"linear_attention": recurrent, "recurrent": recurrent, "sliding_attention": local, "attention": local}
    dense = mlp("mlp_block", width, config.intermediate_size // 2, bias=True)
    after = Sublayer("channel_pre_norm", dense, gain_offset=1)
    blocks = tuple(
        BlockSpec(f"model.layers.{i}", (Sublayer("temporal_pre_norm", kinds[kind], gain_offset=1), after), hosted=True)
        for i, kind in enumerate(config.layers_block_type)
    )
    return ModelSpec(
        width, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", blocks, "model.final_norm", "lm_head",
        residual_fp32=False, final_gain_offset=1,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "lru_width": 64, "attention_window_size": 32, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="recurrent_gemma", describe=describe, tiny=(_TINY,))
