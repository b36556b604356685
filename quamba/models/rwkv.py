"""RWKV-4 (transformers' ``rwkv``): an elementwise recurrence and a channel mix, both on inputs mixed with the token
before. Peng et al., 2305.13048."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import ONE, RESID
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

CHANNEL, MIX = ("channel",), ((ONE,), (ONE,), (RESID,))


def _weights(projs: tuple[Proj, ...]) -> list[Param]:
    return [Param(p.weight, ((p.outputs[0].segment,), (p.input,))) for p in projs]


def _attention(width: int, inner: int) -> MixerSpec:
    projs = (
        Proj("key", "key", "mixed_key", RESID, (Output("k", CHANNEL, ("exp",)),)),
        Proj("value", "value", "mixed_value", RESID, (Output("v", CHANNEL),)),
        Proj("receptance", "receptance", "mixed_receptance", RESID, (Output("z", CHANNEL, ("sigmoid",)),)),
        Proj("output", "output", "y", CHANNEL, (Output("residual", RESID),)),
    )
    params = _weights(projs) + [Param(f"time_mix_{name}", MIX) for name in ("key", "value", "receptance")]
    params += [Param("time_decay", ((CHANNEL,),)), Param("time_first", ((CHANNEL,),))]
    axes = {a.name: a for a in (Axis("resid", width), Axis("channel", inner), Axis("one", 1, fixed=True))}
    out = OutSite("z", None, role="output")
    inputs = (
        ScanInput("v", "scan_v", CHANNEL, "value", at=("value", None)),
        ScanInput("k", "scan_k", CHANNEL, "key", at=("key", None)),
        ScanInput("z", "scan_q", CHANNEL, "query", at=("receptance", None)),
    )
    return MixerSpec("attention", axes, tuple(params), projs, inputs, Scan("wkv", "diagonal"), out)


def _feed_forward(width: int, hidden: int) -> MixerSpec:
    channel = ("hidden",)
    projs = (
        Proj("up_proj", "key", "mixed_key", RESID, (Output("up", channel, ("act",)),)),
        Proj("gate_proj", "receptance", "mixed_receptance", RESID, (Output("gate", RESID, ("sigmoid",)),)),
        Proj("down_proj", "value", "hidden", channel, (Output("residual", RESID),)),
    )
    params = _weights(projs) + [Param(f"time_mix_{name}", MIX) for name in ("key", "receptance")]
    axes = {a.name: a for a in (Axis("resid", width), Axis("hidden", hidden), Axis("one", 1, fixed=True))}
    return MixerSpec("feed_forward", axes, tuple(params), projs, out=OutSite(None, None, role="down_proj"))


def describe(config: Any) -> ModelSpec:
    """What is multiplied with the receptance per channel, and a LayerNorm, keep the residual stream from rotating."""
    width = config.hidden_size
    attention = Sublayer("ln1", _attention(width, config.attention_hidden_size or width), "layer")
    mixing = _feed_forward(width, config.intermediate_size or 4 * width)
    after = Sublayer("ln2", mixing, "layer", residual_weighted=True)
    blocks = tuple(
        BlockSpec(
            f"rwkv.blocks.{i}", (attention, after), hosted=True, params=() if i else ("pre_ln.weight", "pre_ln.bias")
        )
        for i in range(config.num_hidden_layers)
    )
    return ModelSpec(
        width, config.vocab_size, config.layer_norm_epsilon, "rwkv.embeddings", blocks, "rwkv.ln_out", "head",
        residual_fp32=False, returns=3, final_norm_kind="layer",
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "attention_hidden_size": 64, "intermediate_size": 96,
    "context_length": 64, "rescale_every": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="rwkv", describe=describe, tiny=(_TINY,), settings=(("rescale_every", 0),))
