"""Write tests/golden/linear_attention: tiny models of flash-linear-attention with random weights, and their logits.

Run it where flash-linear-attention 0.6.0 can be imported, on a CPU: python scripts/golden_linear_attention.py OUTPUT

fla's kernels run in Triton's interpreter. Three things stand in for what that lacks: the timing of configurations (the
first one is taken), flash attention, and LightNet's additive gate, which the interpreter cannot run.
"""

# ruff: noqa: E402  the environment is read on import

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"], os.environ["FLA_CACHE_RESULTS"] = "1", "0"

import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.autotuner import Autotuner

Autotuner.do_bench = property(lambda self: lambda *args, **kwargs: [1.0, 1.0, 1.0], lambda self, value: None)

import fla.layers.attn
import fla.models  # noqa: F401  registers its configurations
import fla.ops.lightnet.fused_recurrent
from transformers import AutoConfig, AutoModelForCausalLM

SHARED = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 16, "intermediate_size": 8}
RANKS = {"decay_low_rank_dim": 4, "gate_low_rank_dim": 4, "a_low_rank_dim": 4, "v_low_rank_dim": 4}
SOFTMAX = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
GROUPED = {"num_heads": 1, "num_v_heads": 2, "expand_v": 1.0}
CASES = {
    "gated_deltanet": ("gated_deltanet", {"head_dim": 4, "num_heads": 2}),
    "gated_deltanet-hybrid": (
        "gated_deltanet",
        {"head_dim": 8, **GROUPED, "use_gate": False, "allow_neg_eigval": True,
         "attn": {**SOFTMAX, "window_size": 4, "qkv_bias": True}},
    ),
    "delta_net": ("delta_net", {"num_heads": 2}),
    "gla": ("gla", {"num_heads": 2}),
    "retnet": ("retnet", {"num_heads": 2, "expand_v": 1.0}),
    "hgrn2": ("hgrn2", {"expand_ratio": 8}),
    "hgrn": ("hgrn", {}),
    "kda": ("kda", {"head_dim": 8, "num_heads": 2}),
    "gated_deltaproduct": (
        "gated_deltaproduct",
        {"head_dim": 8, "num_heads": 1, "expand_v": 1.0, "use_forget_gate": True, "allow_neg_eigval": True,
         "num_householder": 2},
    ),
    "rwkv7": ("rwkv7", {"head_dim": 8, **RANKS}),
    "rwkv6": ("rwkv6", {"num_heads": 2, "proj_low_rank_dim": 4, "gate_low_rank_dim": 4}),
    "rwkv6-hybrid": (
        "rwkv6",
        {"num_heads": 2, "proj_low_rank_dim": 4, "gate_low_rank_dim": 4, "norm_bias": False, "attn": [SOFTMAX]},
    ),
    "lightnet": ("lightnet", {"expand_ratio": 8, "gate_low_rank_dim": 4}),
}  # fmt: skip
BATCH, TOKENS, PADDED = 2, 9, 3


def flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, window_size, **kwargs):
    """flash_attn_varlen_func over packed [tokens, heads, size]."""
    rows = []
    for start, end in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True):
        part = [t[start:end].transpose(0, 1) for t in (q, k, v)]
        at = torch.arange(end - start)
        seen = at[:, None] >= at
        if window_size[0] >= 0:
            seen &= at[:, None] - at <= window_size[0]
        rows.append(scaled_dot_product_attention(*part, attn_mask=seen, enable_gqa=True).transpose(0, 1))
    return torch.cat(rows)


def additive_gate(x, initial_state=None, cu_seqlens=None):
    """fused_additive_gate over packed [1, tokens, H, K] without an initial state."""
    parts = []
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        z = torch.logcumsumexp(x[:, start:end], 1)
        g = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1] - z[:, 1:]], 1)
        parts.append((torch.exp(x[:, start:end] - z), g, z[:, -1:]))
    keys, gates, last = zip(*parts, strict=True)
    return torch.cat(keys, 1), torch.cat(gates, 1), torch.cat(last)


fla.layers.attn.flash_attn_func = fla.layers.attn.flash_attn_varlen_func = flash_attention
fla.ops.lightnet.fused_recurrent.fused_additive_gate = additive_gate


def random_values(name: str, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
    """Values that make every parameter count, exact in fp16."""
    noise = torch.randn(shape, generator=rng)
    if name.endswith("A_log"):
        noise = torch.log(0.2 + 2 * torch.rand(shape, generator=rng))
    elif "norm" in name and name.endswith("weight"):
        noise = 1 + 0.2 * noise
    elif name.endswith("weight") and "embeddings" not in name:
        noise = 1.3 * noise / noise[0].numel() ** 0.5
    elif "embeddings" not in name:
        noise = 0.5 * noise
    return noise.half().float()


def main(output: Path) -> None:
    expected = {}
    for name, (kind, changes) in CASES.items():
        config = AutoConfig.for_model(kind, **{**SHARED, **changes})
        model = AutoModelForCausalLM.from_config(config).float().eval()
        rng = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for path, parameter in sorted(model.named_parameters()):
                parameter.copy_(random_values(path, parameter.shape, rng))
            ids = torch.randint(0, SHARED["vocab_size"], (BATCH, TOKENS), generator=rng)
            mask = torch.ones_like(ids)
            mask[0, :PADDED] = 0
            expected[f"{name}.input_ids"] = ids.to(torch.uint8)
            expected[f"{name}.logits"] = model(ids, attention_mask=mask, use_cache=False).logits.contiguous()
        folder = output / name
        model.half().save_pretrained(folder)
        (folder / "generation_config.json").unlink()
    save_file(expected, output / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
