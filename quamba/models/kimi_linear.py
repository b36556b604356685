"""Kimi Linear (transformers' ``kimi_linear``): a delta rule with a decay per channel (KDA), latent attention without
positions; experts beside a shared one, or an MLP, after each. Moonshot AI, 2510.26692."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import ONE, RESID, WIDTH, experts, mlp
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
    require,
)  # fmt: skip


def _recurrent(config: Any) -> MixerSpec:
    heads, head_dim = config.linear_num_heads, config.linear_head_dim
    axes = [
        Axis("resid", config.hidden_size), Axis("head", heads), Axis("key", head_dim), Axis("value", head_dim),
        Axis("rank", head_dim), Axis("gate_rank", head_dim), Axis("width", config.linear_conv_kernel_dim, fixed=True),
        Axis("one", 1, fixed=True),
    ]  # fmt: skip
    key, value, head, post = ("head", "key"), ("head", "value"), ("head",), ("conv", "silu")
    projs = (
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", key, (*post, "l2")),)),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", key, (*post, "l2")),)),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", value, post),)),
        Proj("f_a_proj", "forget_gate.f_a_proj", "residual", RESID, (Output("f", ("rank",)),), keep=True),
        Proj("f_b_proj", "forget_gate.f_b_proj", "f", ("rank",), (Output("rate", key, ("softplus",)),), keep=True),
        Proj("b_proj", "b_proj", "residual", RESID, (Output("beta", head, ("sigmoid",)),), keep=True),
        Proj("g_a_proj", "g_a_proj", "residual", RESID, (Output("g", ("gate_rank",)),)),
        Proj("g_b_proj", "g_b_proj", "g", ("gate_rank",), (Output("z", value, ("sigmoid",)),)),
        Proj("o_proj", "o_proj", "y", value, (Output("residual", RESID),)),
    )
    params = [Param(p.weight, ((p.outputs[0].segment,), (p.input,))) for p in projs]
    params += [
        Param("conv1d.weight", ((key, key, value), (ONE,), (WIDTH,))),
        Param("forget_gate.dt_bias", ((key,),)),
        Param("forget_gate.A_log", ((ONE,), (ONE,), (head,), (ONE,))),
        Param("o_norm.weight", ((("value",),),)),
    ]
    inputs = (
        ScanInput("v", "scan_v", value, "value"),
        ScanInput("k", "scan_k", key, "key"),
        ScanInput("q", "scan_q", key, "query"),
        ScanInput("rate", "scan_dt", key, "rate"),
    )
    out = OutSite("z", "rms", 0, "o_norm.weight", role="o_proj")
    scan = Scan("delta", "diagonal")
    return MixerSpec("self_attn", {a.name: a for a in axes}, tuple(params), projs, inputs, scan, out)


def _latent(config: Any) -> MixerSpec:
    """Keys and values out of a latent: which of its rows are which is told by their place within a head."""
    axes = [
        Axis("resid", config.hidden_size), Axis("head", config.num_attention_heads),
        Axis("query", config.qk_nope_head_dim + config.qk_rope_head_dim, fixed=True),
        Axis("key_value", config.qk_nope_head_dim + config.v_head_dim, fixed=True),
        Axis("value", config.v_head_dim, fixed=True), Axis("state", config.kv_lora_rank),
        Axis("shared_key", config.qk_rope_head_dim, fixed=True),
    ]  # fmt: skip
    query, value, latent = ("head", "query"), ("head", "value"), ("state",)
    bias = config.attention_bias
    down = (Output("latent", latent, ("rms",), "kv_a_layernorm.weight"), Output("k", ("shared_key",)))
    projs = (
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", query),)),
        Proj("kv_a_proj", "kv_a_proj_with_mqa", "residual", RESID, down, bias),
        Proj("kv_b_proj", "kv_b_proj", "latent", latent, (Output("v", ("head", "key_value"), ("split",)),)),
        Proj("o_proj", "o_proj", "o", value, (Output("residual", RESID),), bias),
    )
    params = [Param(p.weight, (tuple(o.segment for o in p.outputs), (p.input,))) for p in projs]
    params += [Param(f"{p.path}.bias", (tuple(o.segment for o in p.outputs),)) for p in projs if p.bias]
    params += [Param("kv_a_layernorm.weight", ((latent,),))]
    out = OutSite(None, None, role="o_proj")
    return MixerSpec(
        "self_attn", {a.name: a for a in axes}, tuple(params), projs, (), Scan("softmax", "scalar"), out
    )  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU and for queries out of a latent."""
    require(config, "hidden_act", "silu")
    require(config, "q_lora_rank", None)
    width = config.hidden_size
    routed = experts(
        "mlp", width, config.moe_intermediate_size, config.num_local_experts,
        router_params=("gate.e_score_correction_bias",), ordered=config.n_group > 1,
    )  # fmt: skip
    shared = mlp("mlp.shared_experts", width, config.moe_intermediate_size * config.n_shared_experts, role="shared_")
    after = {"sparse": [routed, shared], "dense": [mlp("mlp", width, config.intermediate_size)]}
    kinds = {"linear_attention": _recurrent(config), "full_attention": _latent(config)}
    blocks = tuple(
        BlockSpec(
            f"model.layers.{i}",
            (
                Sublayer("input_layernorm", kinds[kind]),
                *(Sublayer("post_attention_layernorm", part) for part in after[width_kind]),
            ),
            hosted=True,
        )
        for i, (kind, width_kind) in enumerate(zip(config.layer_types, config.mlp_layer_types, strict=True))
    )
    return ModelSpec(
        width, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", blocks, "model.norm", "lm_head",
        residual_fp32=False,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "linear_head_dim": 16,
    "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="kimi_linear", describe=describe, tiny=(_TINY,))
