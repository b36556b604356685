"""Parts that architectures have in common, each described once: recurrent mixers, attention, MLPs, experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quamba.models.spec import Axis, MixerSpec, Output, OutSite, Param, Proj, Scan, ScanInput, Segment

RESID, ONE, WIDTH = ("resid",), ("one",), ("width",)


def ssd(
    path: str,
    sizes: dict[str, int],
    *,
    bias: bool,
    conv_bias: bool,
    out_bias: bool | None = None,
    norm: bool = True,
    norm_groups: int | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    factors: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0),
    eps: float | None = None,
) -> MixerSpec:
    """Mamba2's mixer (Dao and Gu, 2405.21060): sizes D, H, P, G, N, W; norm: a gated RMS norm within ``norm_groups``
    groups (None: the state groups) stands before out_proj; out_bias None: as ``bias``; factors: constants that multiply
    z, x, B, C and dt."""
    out_bias = bias if out_bias is None else out_bias
    sizes = {**sizes, "I": sizes["H"] * sizes["P"]}
    value, state, head = ("head", "value"), ("group", "state"), ("head",)
    axes = [
        Axis("resid", sizes["D"]), Axis("head", sizes["H"], share="group"), Axis("value", sizes["P"]),
        Axis("group", sizes["G"], fixed=True), Axis("state", sizes["N"]), Axis("width", sizes["W"], fixed=True),
        Axis("one", 1, fixed=True),
    ]  # fmt: skip
    rows, mixed = (value, value, state, state, head), (value, state, state)
    params = [
        Param("in_proj.weight", (rows, (RESID,))),
        Param("conv1d.weight", (mixed, (ONE,), (WIDTH,))),
        Param("A_log", ((head,),)),
        Param("D", ((head,),)),
        Param("dt_bias", ((head,),)),
        Param("out_proj.weight", ((RESID,), (value,))),
    ]
    params += [Param("norm.weight", ((value,),))] if norm else []
    params += [Param("conv1d.bias", (mixed,))] if conv_bias else []
    params += [Param("in_proj.bias", (rows,))] if bias else []
    params += [Param("out_proj.bias", ((RESID,),))] if out_bias else []
    posts = (("silu",), *[("conv", "silu")] * 3, ("softplus",))
    parts = zip(("z", "x", "B", "C", "rate"), rows, posts, factors, strict=True)
    outputs = tuple(Output(name, segment, post, factor=factor) for name, segment, post, factor in parts)
    projs = (
        Proj("in_proj", "in_proj", "residual", RESID, outputs, bias),
        Proj("out_proj", "out_proj", "y", value, (Output("residual", RESID),), out_bias),
    )
    inputs = (
        ScanInput("x", "scan_x", value, "value"),
        ScanInput("B", "scan_b", state, "key"),
        ScanInput("C", "scan_c", state, "query"),
        ScanInput("rate", "scan_dt", head, "rate"),
    )
    groups = sizes["G"] if norm_groups is None else norm_groups
    out = OutSite("z", "rms" if norm else None, groups if norm else 0, "norm.weight" if norm else None)
    return MixerSpec(
        path, {a.name: a for a in axes}, tuple(params), projs, inputs, Scan("ssd", "scalar"), out, sizes,
        conv_bias=conv_bias, dt_limit=dt_limit, eps=eps,
    )  # fmt: skip


def mamba2(config: Any, **more: Any) -> MixerSpec:
    """Mamba2's mixer where a config has its sizes and biases under mamba_*, at the path ``mamba``; more: of ``ssd``."""
    sizes = {
        "D": config.hidden_size, "H": config.mamba_n_heads, "P": config.mamba_d_head, "G": config.mamba_n_groups,
        "N": config.mamba_d_state, "W": config.mamba_d_conv,
    }  # fmt: skip
    low, high = (float(limit) for limit in config.time_step_limit)
    return ssd(
        "mamba", sizes, bias=config.mamba_proj_bias, conv_bias=config.mamba_conv_bias, dt_limit=(low, high), **more
    )  # fmt: skip


def selective(
    path: str,
    sizes: dict[str, int],
    *,
    bias: bool,
    conv_bias: bool,
    norms: tuple[str | None, ...] | None = None,
    eps: float | None = None,
) -> MixerSpec:
    """Mamba1's mixer (Gu and Dao, 2312.00752): sizes D, I, N, W, R. norms: RMS norms of dt, B and C after x_proj, by
    the paths of their gains below the mixer (None: without gain)."""
    channel, state, rank = ("channel",), ("state",), ("rank",)
    axes = [
        Axis("resid", sizes["D"]), Axis("channel", sizes["I"]), Axis("state", sizes["N"]), Axis("rank", sizes["R"]),
        Axis("width", sizes["W"], fixed=True), Axis("one", 1, fixed=True),
    ]  # fmt: skip
    params = [
        Param("in_proj.weight", ((channel, channel), (RESID,))),
        Param("conv1d.weight", ((channel,), (ONE,), (WIDTH,))),
        Param("x_proj.weight", ((rank, state, state), (channel,))),
        Param("dt_proj.weight", ((channel,), (rank,))),
        Param("dt_proj.bias", ((channel,),)),
        Param("A_log", ((channel,), (state,))),
        Param("D", ((channel,),)),
        Param("out_proj.weight", ((RESID,), (channel,))),
    ]
    params += [Param("conv1d.bias", ((channel,),))] if conv_bias else []
    params += [Param("in_proj.bias", ((channel, channel),)), Param("out_proj.bias", ((RESID,),))] if bias else []
    post = () if norms is None else ("rms",)
    gains: tuple[str | None, ...] = norms or (None, None, None)
    parts = tuple(
        Output(n, segment, post, gain)
        for n, segment, gain in zip(("dt", "B", "C"), (rank, state, state), gains, strict=True)
    )
    params += [Param(o.gain, ((o.segment,),)) for o in parts if o.gain]
    projs = (
        Proj("in_proj", "in_proj", "residual", RESID,
             (Output("x", channel, ("conv", "silu")), Output("z", channel, ("silu",))), bias),
        Proj("x_proj", "x_proj", "x", channel, parts),
        Proj("dt_proj", "dt_proj", "dt", rank, (Output("rate", channel, ("softplus",)),), True),
        Proj("out_proj", "out_proj", "y", channel, (Output("residual", RESID),), bias),
    )  # fmt: skip
    inputs = (
        ScanInput("x", "scan_x", channel, "value"),
        ScanInput("B", "scan_b", state, "key"),
        ScanInput("C", "scan_c", state, "query"),
        ScanInput("rate", "scan_dt", channel, "rate"),
    )
    return MixerSpec(
        path, {a.name: a for a in axes}, tuple(params), projs, inputs, Scan("selective", "diagonal"),
        OutSite(gate="z", norm=None), {**sizes, "G": 1}, conv_bias=conv_bias, eps=eps,
    )  # fmt: skip


def attention(
    path: str,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    rope: bool,
    bias: bool = False,
    out_bias: bool | None = None,
    gate: bool = False,
    norms: tuple[str, ...] = (),
    whole: bool = False,
) -> MixerSpec:
    """Softmax attention with q_proj, k_proj, v_proj and o_proj over [kv head, query heads that share it, head_dim].

    gate: q_proj gives each head a gate of the output beside its query; norms: gains of the norms of q and of k, below
    the mixer, one for all heads, or with ``whole`` over all heads at once; out_bias None: as ``bias``.
    """
    out_bias = bias if out_bias is None else out_bias
    axes = [
        Axis("resid", width), Axis("kv_head", kv_heads), Axis("repeat", heads // kv_heads),
        Axis("key", head_dim, fixed=rope), Axis("value", head_dim),
    ]  # fmt: skip
    query, key, value = ("kv_head", "repeat", "key"), ("kv_head", "key"), ("kv_head", "value")
    seen: Segment = ("kv_head", "repeat", "value")
    if gate:  # rows [head, query | gate]: the order of a head's rows stays as it is
        axes += [Axis("key_gate", 2 * head_dim, fixed=True)]
        axes[4] = Axis("value", head_dim, fixed=True)
        query = ("kv_head", "repeat", "key_gate")
    post = (*(("rms",) if norms else ()), *(("rope",) if rope else ()))
    projs = (
        Proj("q_proj", "q_proj", "residual", RESID, (Output("q", query, post),), bias),
        Proj("k_proj", "k_proj", "residual", RESID, (Output("k", key, post),), bias),
        Proj("v_proj", "v_proj", "residual", RESID, (Output("v", value),), bias),
        Proj("o_proj", "o_proj", "o", seen, (Output("residual", RESID),), out_bias),
    )
    params = weights(projs)
    spans = (("kv_head", "repeat", "key"), key) if whole else (("key",), ("key",))
    params += [Param(name, ((span,),)) for name, span in zip(norms, spans, strict=bool(norms))]
    inputs = (
        ScanInput("v", "attn_v", value, "value"),
        ScanInput("k", "attn_k", key, "key"),
        ScanInput("q", "attn_q", query, "query"),
    )
    out = OutSite(gate="q" if gate else None, norm=None, role="o_proj")
    return MixerSpec(
        path, {a.name: a for a in axes}, tuple(params), projs, inputs, Scan("softmax", "scalar"), out
    )  # fmt: skip


def delta_net(
    path: str,
    sizes: dict[str, int],
    projs: tuple[tuple[str, str], ...],
    *,
    out: str = "out_proj",
    norm: str = "norm.weight",
) -> MixerSpec:
    """A gated delta rule (Yang et al., 2412.06464) of transformers' own: sizes D, W, K and V heads, k and v channels of
    a head.

    projs: (path, what it gives: of q, k, v, z, b, a, one letter each) in the order of execution; b and a, the rates of
    writing and forgetting, stay floats. norm: gain [v] of the gated norm of every head.
    """
    heads, repeat = sizes["K"], sizes["V"] // sizes["K"]
    axes = [
        Axis("resid", sizes["D"]), Axis("kv_head", heads), Axis("repeat", repeat), Axis("key", sizes["k"]),
        Axis("value", sizes["v"]), Axis("width", sizes["W"], fixed=True), Axis("one", 1, fixed=True),
    ]  # fmt: skip
    key, value, rate = ("kv_head", "key"), ("kv_head", "repeat", "value"), ("kv_head", "repeat")
    post = ("conv", "silu")
    gives = {
        "q": Output("q", key, (*post, "l2")), "k": Output("k", key, (*post, "l2")), "v": Output("v", value, post),
        "z": Output("z", value, ("silu",)), "b": Output("beta", rate, ("sigmoid",)),
        "a": Output("rate", rate, ("softplus",)),
    }  # fmt: skip
    made = [
        Proj(name, name, "residual", RESID, tuple(gives[letter] for letter in letters), keep=letters in ("b", "a"))
        for name, letters in projs
    ]
    made.append(Proj(out, out, "y", value, (Output("residual", RESID),)))
    params = weights(made)
    params += [Param("conv1d.weight", ((key, key, value), (ONE,), (WIDTH,)))]
    params += [Param("A_log", ((rate,),)), Param("dt_bias", ((rate,),)), Param(norm, ((("value",),),))]
    inputs = (
        ScanInput("v", "scan_v", value, "value"),
        ScanInput("k", "scan_k", key, "key"),
        ScanInput("q", "scan_q", key, "query"),
        ScanInput("rate", "scan_dt", rate, "rate"),
    )
    site = OutSite("z", "rms", 0, norm, role=out)
    return MixerSpec(
        path, {a.name: a for a in axes}, tuple(params), tuple(made), inputs, Scan("delta", "scalar"), site
    )  # fmt: skip


def mlp(
    path: str,
    width: int,
    hidden: int,
    *,
    up: tuple[str, ...] = ("gate_proj", "up_proj"),
    down: str = "down_proj",
    bias: bool = False,
    fused: bool = False,
    role: str = "",
) -> MixerSpec:
    """down(act(gate) * up), or down(act(up)) with one name in ``up``; fused: its one linear holds gate and up, one
    after the other. role: a prefix of the roles ("shared_" for an expert that every token sees)."""
    channel = ("hidden",)
    outputs = [(Output("gate", channel, ("act",)), Output("up", channel))] if fused else [
        (Output(name, channel, ("act",)),) for name in up
    ]  # fmt: skip
    projs = [
        Proj(f"{role}{name if not fused else 'up_proj'}", name, "residual", RESID, made, bias)
        for name, made in zip(up, outputs, strict=True)
    ]
    projs.append(Proj(f"{role}down_proj", down, "hidden", channel, (Output("residual", RESID),), bias))
    params = weights(projs)
    axes = {a.name: a for a in (Axis("resid", width), Axis("hidden", hidden))}
    return MixerSpec(path, axes, tuple(params), tuple(projs), out=OutSite(None, None, role=f"{role}down_proj"))


def experts(
    path: str,
    width: int,
    hidden: int,
    count: int,
    *,
    gated: bool = True,
    router: str = "gate",
    router_params: tuple[str, ...] = (),
    ordered: bool = False,
    latent: int | None = None,
    shared_gate: str | None = None,
) -> MixerSpec:
    """A router and ``count`` MLPs whose weights are stacked: experts.gate_up_proj [E, 2 F, D] (experts.up_proj
    [E, F, D] where nothing is gated) and experts.down_proj [E, D, F].

    router_params: tensors [E] beside its weight; ordered: the router knows experts by their place; latent: width of the
    stream between fc1_latent_proj and fc2_latent_proj in which the experts work, None for the residual stream itself;
    shared_gate: the linear that weighs an expert that every token sees.
    """
    expert, channel = ("expert",), ("hidden",)
    inner = RESID if latent is None else ("latent",)
    name = "experts.gate_up_proj" if gated else "experts.up_proj"
    up = (Output("gate", channel, ("act",)), Output("up", channel)) if gated else (Output("up", channel, ("act",)),)
    projs: tuple[Proj, ...] = (
        Proj("router", router, "residual", RESID, (Output("router", expert, ("softmax",)),), keep=True),
        Proj("expert_up_proj", name, "residual" if latent is None else "latent", inner, up, stack="expert"),
        Proj("expert_down_proj", "experts.down_proj", "hidden", channel,
             (Output("residual" if latent is None else "mixture", inner),), stack="expert"),
    )  # fmt: skip
    if shared_gate is not None:
        projs = (Proj("shared_gate", shared_gate, "residual", RESID, (Output("shared", ONE),), keep=True), *projs)
    if latent is not None:
        down = Proj("latent_down_proj", "fc1_latent_proj", "residual", RESID, (Output("latent", inner),))
        back = Proj("latent_up_proj", "fc2_latent_proj", "mixture", inner, (Output("residual", RESID),))
        projs = (*projs[:-2], down, *projs[-2:], back)
    params = weights(projs)
    params += [Param(p, ((expert,),)) for p in router_params]
    axes = [
        Axis("resid", width), Axis("hidden", hidden), Axis("expert", count, fixed=ordered), Axis("one", 1, fixed=True)
    ]  # fmt: skip
    axes += [Axis("latent", latent)] if latent is not None else []
    out = OutSite(None, None, role="expert_down_proj")
    return MixerSpec(path, {a.name: a for a in axes}, tuple(params), projs, out=out)


def weights(projs: Iterable[Proj]) -> list[Param]:
    """Weights and biases of projections, in the order of execution."""
    params = []
    for proj in projs:
        rows, stack = tuple(output.segment for output in proj.outputs), (((proj.stack,),),) if proj.stack else ()
        params.append(Param(proj.weight, (*stack, rows, (proj.input,))))
        params += [Param(f"{proj.path}.bias", (rows,))] if proj.bias else []
    return params
