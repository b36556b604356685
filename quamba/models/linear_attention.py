"""What flash-linear-attention's families have in common: the decoder around their mixers, the axes of their states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from quamba.models.parts import ONE, WIDTH, attention, mlp, weights
from quamba.models.spec import (
    Axis,
    BlockSpec,
    MixerSpec,
    ModelSpec,
    OutSite,
    Param,
    Proj,
    Scan,
    ScanInput,
    Segment,
    Sublayer,
)  # fmt: skip

KEY, VALUE, RATE = ("kv_head", "key"), ("kv_head", "value"), ("kv_head", "repeat")
MANY_KEYS, MANY_VALUES = (*RATE, "key"), (*RATE, "value")
"""Of every head, where several share the keys or the values of one."""


def axes(
    config: Any, heads: int, repeat: int, key: int, value: int, *more: Axis, fixed: tuple[str, ...] = ()
) -> list[Axis]:
    """The axes of a mixer with a matrix state: heads that have something to themselves, times those that share it; key
    and value channels of a head. fixed: names of axes whose order carries meaning."""
    named = {"kv_head": heads, "repeat": repeat, "key": key, "value": value}
    own = [Axis(name, size, fixed=name in fixed) for name, size in named.items()]
    return [Axis("resid", config.hidden_size), *own, *more, *small(config)]


def small(config: Any) -> list[Axis]:
    """The axes of the short convolutions."""
    return [Axis("width", getattr(config, "conv_size", 1), fixed=True), Axis("one", 1, fixed=True)]


def convolutions(config: Any, **channels: Segment) -> list[Param]:
    """The weights of the short convolutions by what they convolve, where the config has them."""
    if not config.use_short_conv:
        return []
    return [Param(f"{name}_conv1d.weight", ((segment,), (ONE,), (WIDTH,))) for name, segment in channels.items()]


def post(config: Any, *steps: str) -> tuple[str, ...]:
    """The steps between a projection and the scan, after the convolution where the config has one."""
    return ("conv", *steps) if getattr(config, "use_short_conv", False) else steps


def scan_inputs(**segments: Segment) -> tuple[ScanInput, ...]:
    """Of q, k and v those that may become int8, by their axes."""
    meanings: dict[str, Literal["query", "key", "value"]] = {"q": "query", "k": "key", "v": "value"}
    return tuple(ScanInput(name, f"scan_{name}", axes, meanings[name]) for name, axes in segments.items())


def mixer(
    named: Iterable[Axis],
    projs: tuple[Proj, ...],
    beside: Iterable[Param],
    inputs: tuple[ScanInput, ...],
    scan: Scan,
    out: OutSite,
) -> MixerSpec:
    """A mixer whose tensors are the weights of its projections and those ``beside`` them."""
    return MixerSpec("attn", {a.name: a for a in named}, (*weights(projs), *beside), projs, inputs, scan, out)


def decoder(config: Any, recurrent: Callable[[int], MixerSpec], after: MixerSpec | None = None) -> ModelSpec:
    """The whole model: the family's mixer or softmax attention in each layer, and a gated MLP behind RMS norms; with
    ``after`` RWKV's channel mix behind layer norms."""
    width = config.hidden_size
    blocks = []
    for i in range(config.num_hidden_layers):
        full = config.attention_of(i)
        first = recurrent(i) if full is None else attention(
            "attn", width, full.num_heads, full.num_kv_heads, width // full.num_heads, rope=True, bias=full.qkv_bias,
            out_bias=False,
        )  # fmt: skip
        before: tuple[str, ...] = ()
        if after is None:
            sublayers = (Sublayer("attn_norm", first), Sublayer("mlp_norm", mlp("mlp", width, config.mlp_size)))
        else:
            shift = config.norm_bias
            sublayers = (
                Sublayer("attn_norm", first, "layer", norm_bias=shift),
                Sublayer("ffn_norm", after, "layer", norm_bias=shift),
            )
            before = ("pre_norm.weight", "pre_norm.bias")[: 1 + shift] if i == 0 and config.norm_first else ()
        blocks.append(BlockSpec(f"model.layers.{i}", sublayers, hosted=True, params=before))
    return ModelSpec(
        width, config.vocab_size, config.norm_eps, "model.embeddings", tuple(blocks), "model.norm", "lm_head",
        residual_fp32=False, carry="carry", params=() if config.lower_bounds is None else ("model.lower_bounds",),
        final_norm_kind="rms" if after is None else "layer", final_norm_bias=after is None or config.norm_bias,
    )  # fmt: skip
