"""Qwen3-Next (transformers' ``qwen3_next``): gated delta rule and gated attention; experts beside a shared one, or an
MLP, after each. q, k, v and z of a key head lie together in one projection, its two rates in another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quamba.models.parts import RESID, attention, delta_net, experts, mlp
from quamba.models.spec import (
    Architecture,
    Axis,
    BlockSpec,
    MixerSpec,
    ModelSpec,
    Output,
    Param,
    Proj,
    Sublayer,
    require,
)


def _recurrent(config: Any) -> MixerSpec:
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    sizes = {
        "D": config.hidden_size, "W": config.linear_conv_kernel_dim, "K": config.linear_num_key_heads,
        "V": config.linear_num_value_heads, "k": keys, "v": values,
    }  # fmt: skip
    plain = delta_net("linear_attn", sizes, ())
    repeat = sizes["V"] // sizes["K"]
    joint = [Axis("qkvz", 2 * (keys + repeat * values), fixed=True), Axis("ba", 2 * repeat, fixed=True)]
    # the rows of a head keep their order, so neither keys nor values can be permuted on their own
    held = [replace(plain.axes[name], fixed=True) for name in ("key", "value", "repeat")]
    post, value, rate = ("conv", "silu"), ("repeat", "value"), ("repeat",)
    of_head = (
        Output("q", ("key",), (*post, "l2")), Output("k", ("key",), (*post, "l2")), Output("v", value, post),
        Output("z", value, ("silu",)),
    )  # fmt: skip
    rates_of_head = (Output("beta", rate, ("sigmoid",)), Output("rate", rate, ("softplus",)))
    whole = (Output("qkvz", ("kv_head", "qkvz"), within=of_head),)
    qkvz = Proj("in_proj_qkvz", "in_proj_qkvz", "residual", RESID, whole)
    whole = (Output("ba", ("kv_head", "ba"), within=rates_of_head),)
    rates = Proj("in_proj_ba", "in_proj_ba", "residual", RESID, whole, keep=True)
    params = [Param(p.weight, ((p.outputs[0].segment,), (RESID,))) for p in (qkvz, rates)]
    return replace(
        plain,
        axes={**plain.axes, **{axis.name: axis for axis in (*joint, *held)}},
        params=(*params, *plain.params),
        projs=(qkvz, rates, *plain.projs),
    )


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    width = config.hidden_size
    full = attention(
        "self_attn", width, config.num_attention_heads, config.num_key_value_heads, config.head_dim, rope=True,
        bias=config.attention_bias, gate=True, norms=("q_norm.weight", "k_norm.weight"),
    )  # fmt: skip
    kinds = {"linear_attention": _recurrent(config), "full_attention": full}
    dense = [mlp("mlp", width, config.intermediate_size)]
    sparse = [
        mlp("mlp.shared_expert", width, config.shared_expert_intermediate_size, role="shared_"),
        experts("mlp", width, config.moe_intermediate_size, config.num_experts, shared_gate="shared_expert_gate"),
    ]
    blocks = []
    for i, kind in enumerate(config.layer_types):
        is_sparse = config.num_experts > 0 and (i + 1) % config.decoder_sparse_step == 0
        after = sparse if is_sparse and i not in config.mlp_only_layers else dense
        sublayers = [Sublayer("input_layernorm", kinds[kind], gain_offset=1)]
        sublayers += [Sublayer("post_attention_layernorm", part, gain_offset=1) for part in after]
        blocks.append(BlockSpec(f"model.layers.{i}", tuple(sublayers), hosted=True))
    return ModelSpec(
        width, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", tuple(blocks), "model.norm", "lm_head",
        residual_fp32=False, final_gain_offset=1,
    )  # fmt: skip


# With fewer channels random keys are so near to orthogonal that rounding decides the sign of the first outputs.
_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
    "mlp_only_layers": [1], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="qwen3_next", describe=describe, tiny=(_TINY,))
