"""xLSTM (transformers' ``xlstm``): a matrix memory with exponential gates (mLSTM), an MLP after each. Beck et al.,
2405.04517 and 2503.13427."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import RESID, mlp
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


def _mixer(config: Any) -> MixerSpec:
    heads = config.num_heads
    keys, values = int(config.hidden_size * config.qk_dim_factor), int(config.hidden_size * config.v_dim_factor)
    axes = [
        Axis("resid", config.hidden_size), Axis("head", heads), Axis("key", keys // heads),
        Axis("value", values // heads),
    ]  # fmt: skip
    key, value, head = ("head", "key"), ("head", "value"), ("head",)
    q, k, v = Output("q", key), Output("k", key), Output("v", value)
    gate, rates = Output("z", value, ("sigmoid",)), [Output("beta", head, ("exp",)), Output("rate", head, ("sigmoid",))]
    made: dict[str, list[tuple[str, tuple[Output, ...]]]] = {
        "single": [("q", (q,)), ("k", (k,)), ("v", (v,)), ("ogate_preact", (gate,)),
                   ("igate_preact", (rates[0],)), ("fgate_preact", (rates[1],))],
        "fused": [("qkv_opreact", (q, k, v, gate)), ("ifgate_preact", tuple(rates))],
    }  # fmt: skip
    small = {"igate_preact", "fgate_preact", "ifgate_preact"}
    projs = [
        Proj(name, name, "residual", RESID, outputs, bias=name in small, keep=name in small)
        for name, outputs in made[config.weight_mode]
    ]
    projs.append(Proj("out_proj", "out_proj", "y", value, (Output("residual", RESID),)))
    params = [Param(p.weight, (tuple(o.segment for o in p.outputs), (p.input,))) for p in projs]
    params += [Param(f"{p.path}.bias", (tuple(o.segment for o in p.outputs),)) for p in projs if p.bias]
    params += [Param("multihead_norm.weight", ((value,),))]
    inputs = (
        ScanInput("v", "scan_v", value, "value", at=("mlstm_backend", "value")),
        ScanInput("k", "scan_k", key, "key", at=("mlstm_backend", "key")),
        ScanInput("q", "scan_q", key, "query", at=("mlstm_backend", "query")),
        ScanInput("rate", "scan_dt", head, "rate"),
    )
    out = OutSite("z", "layer", 0, "multihead_norm.weight")
    return MixerSpec(
        "mlstm_layer", {a.name: a for a in axes}, tuple(params), tuple(projs), inputs, Scan("mlstm", "scalar"), out
    )


def describe(config: Any) -> ModelSpec:
    """Raises UserError for norms with a shift and for linears with a bias."""
    require(config, "use_bias", False)
    step = config.ffn_round_up_to_multiple_of
    hidden = -int(-(config.hidden_size * config.ffn_proj_factor) // step) * step
    fused = config.weight_mode == "fused"
    up = ("proj_up_gate_z",) if fused else ("proj_up_gate", "proj_up")
    dense = mlp("ffn", config.hidden_size, hidden, up=up, down="proj_down", fused=fused)
    sublayers = (Sublayer("norm_mlstm", _mixer(config)), Sublayer("norm_ffn", dense))
    blocks = tuple(BlockSpec(f"backbone.blocks.{i}", sublayers, hosted=True) for i in range(config.num_hidden_layers))
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.norm_eps, "backbone.embeddings", blocks, "backbone.out_norm",
        "lm_head", residual_fp32=False, returns=2, logits_fp32=True,
    )  # fmt: skip


_TINY = {
    "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 96, "num_heads": 2, "qk_dim_factor": 0.5,
    "ffn_proj_factor": 1.0, "chunk_size": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="xlstm", describe=describe, tiny=(_TINY,))
