"""Zamba2 (transformers' ``zamba2``): Mamba2 mixers; some layers add to the mixer's input what a transformer block makes
of the stream beside the embedding. Few such blocks are used in turn: one set of weights each, with low-rank adapters of
each use, and a linear of each layer. Glorioso et al., 2411.15242."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from quamba.models.parts import RESID, attention, mlp, ssd
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

SHARED = "shared_transformer"
BOTH = ("half", "resid")
"""The stream, and the embedding beside it: both in the basis of the stream."""


def _adapted(mixer: MixerSpec, rank: int, adapters: Iterable[tuple[str, Proj]]) -> MixerSpec:
    """The mixer with low-rank linears beside some projections: (path, the projection that it adds to)."""
    down, up = [], []
    for path, proj in adapters:
        inner = (Output(path, ("rank",)),)
        down.append(Proj("adapter_down_proj", f"{path}.0", "residual", proj.input, inner))
        up.append(Proj("adapter_up_proj", f"{path}.1", path, ("rank",), proj.outputs))
    if not down:
        return mixer
    params = [Param(p.weight, (tuple(o.segment for o in p.outputs), (p.input,))) for p in (*down, *up)]
    return replace(
        mixer,
        axes={**mixer.axes, "rank": Axis("rank", rank)},
        projs=(*mixer.projs[:-1], *down, *up, mixer.projs[-1]),
        params=(*mixer.params, *params),
    )


def _attention(config: Any, uses: range) -> MixerSpec:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.use_shared_attention_adapter:
        require(config, "num_key_value_heads", heads)  # the adapters have a query's rows
    plain = attention(
        f"{SHARED}.self_attn", config.hidden_size, heads, kv_heads, config.attention_head_dim, rope=config.use_mem_rope
    )
    projs = tuple(replace(p, input=BOTH) if p.reads == "residual" else p for p in plain.projs)
    read = {p.weight: Param(p.weight, ((p.outputs[0].segment,), (BOTH,))) for p in projs[:3]}
    both = replace(
        plain,
        axes={**plain.axes, "half": Axis("half", 2, fixed=True)},
        projs=projs,
        params=tuple(read.get(param.path, param) for param in plain.params),
    )
    adapters = [
        (f"linear_{proj.path[0]}_adapter_list.{use}", proj)
        for proj in projs[:3] for use in uses if config.use_shared_attention_adapter
    ]  # fmt: skip
    return _adapted(both, config.adapter_rank, adapters)


def _dense(config: Any, uses: range) -> MixerSpec:
    plain = mlp(
        f"{SHARED}.feed_forward", config.hidden_size, config.intermediate_size, up=("gate_up_proj",), fused=True,
        bias=config.add_bias_linear,
    )  # fmt: skip
    adapters = [(f"gate_up_proj_adapter_list.{use}", plain.projs[0]) for use in uses]
    return _adapted(plain, config.adapter_rank, adapters)


def _layer(config: Any, path: str) -> Sublayer:
    sizes = {
        "D": config.hidden_size, "H": config.n_mamba_heads, "P": config.mamba_headdim, "G": config.mamba_ngroups,
        "N": config.mamba_d_state, "W": config.mamba_d_conv,
    }  # fmt: skip
    limits = (float(config.time_step_min), float("inf"))
    mixer = ssd(f"{path}mamba", sizes, bias=config.add_bias_linear, conv_bias=True, dt_limit=limits, eps=1e-5)
    return Sublayer(f"{path}input_layernorm", mixer)


def _bridge(config: Any) -> Sublayer:
    """The linear between the shared block and the stream: it reads what the shared MLP gives, without a norm."""
    proj = Proj("linear", "linear", "residual", RESID, (Output("residual", RESID),))
    mixer = MixerSpec(
        "", {"resid": Axis("resid", config.hidden_size)}, (Param("linear.weight", ((RESID,), (RESID,))),), (proj,)
    )
    return Sublayer(None, mixer)


def describe(config: Any) -> ModelSpec:
    """Nothing is added to the stream inside a shared block, yet all of it can stand in the stream's basis: an RMS norm
    over the halves commutes with a rotation of each, and what attention and MLP give is read by linears alone."""
    total, count = config.num_mem_blocks, len(config.hybrid_layer_ids)
    blocks: list[BlockSpec] = []
    for i, kind in enumerate(config.layers_block_type):
        path = f"model.layers.{i}"
        if kind != "hybrid":
            blocks.append(BlockSpec(path, (_layer(config, ""),), hosted=True))
            continue
        use, own = config.hybrid_layer_ids.index(i), (_bridge(config), _layer(config, "mamba_decoder."))
        if use >= total:
            lender = f"model.layers.{config.hybrid_layer_ids[use % total]}.{SHARED}"
            blocks.append(BlockSpec(path, own, hosted=True, borrows=(SHARED, lender)))
            continue
        uses = range(use, count, total)
        shared = (
            Sublayer(f"{SHARED}.input_layernorm", _attention(config, uses)),
            Sublayer(f"{SHARED}.pre_ff_layernorm", _dense(config, uses)),
        )
        blocks.append(BlockSpec(path, (*shared, *own), hosted=True))
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", tuple(blocks),
        "model.final_layernorm", "lm_head", residual_fp32=False, passes_embedding=True,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 96, "intermediate_size": 96, "num_attention_heads": 4,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"], "num_mem_blocks": 2, "n_mamba_heads": 8,
    "mamba_d_state": 16, "mamba_ngroups": 2, "chunk_size": 32, "use_shared_attention_adapter": True,
    "adapter_rank": 8, "use_mem_rope": True, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="zamba2",
    describe=describe,
    tiny=(_TINY, {**_TINY, "layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 3,
                  "num_mem_blocks": 1, "use_shared_attention_adapter": False, "use_mem_rope": False,
                  "add_bias_linear": True}),
)  # fmt: skip
