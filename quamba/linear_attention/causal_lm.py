"""The classes that transformers opens, under the names that fla writes into config.json."""

from __future__ import annotations

from quamba.linear_attention.configs import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedDeltaProductConfig,
    GLAConfig,
    HGRN2Config,
    HGRNConfig,
    KDAConfig,
    LightNetConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
)  # fmt: skip
from quamba.linear_attention.decoder import LinearAttentionForCausalLM
from quamba.linear_attention.delta_net import DeltaNet
from quamba.linear_attention.gated_deltanet import GatedDeltaNet
from quamba.linear_attention.gated_deltaproduct import GatedDeltaProduct
from quamba.linear_attention.gla import GatedLinearAttention
from quamba.linear_attention.hgrn import HGRNAttention
from quamba.linear_attention.hgrn2 import HGRN2Attention
from quamba.linear_attention.kda import KimiDeltaAttention
from quamba.linear_attention.lightnet import LightNetAttention
from quamba.linear_attention.retnet import MultiScaleRetention
from quamba.linear_attention.rwkv6 import RWKV6Attention, RWKV6Block
from quamba.linear_attention.rwkv7 import RWKV7Attention, RWKV7Block


class GatedDeltaNetForCausalLM(LinearAttentionForCausalLM):
    """Gated DeltaNet with a head."""

    config_class = GatedDeltaNetConfig
    mixer = GatedDeltaNet


class DeltaNetForCausalLM(LinearAttentionForCausalLM):
    """DeltaNet with a head."""

    config_class = DeltaNetConfig
    mixer = DeltaNet


class GLAForCausalLM(LinearAttentionForCausalLM):
    """Gated linear attention with a head."""

    config_class = GLAConfig
    mixer = GatedLinearAttention


class RetNetForCausalLM(LinearAttentionForCausalLM):
    """RetNet with a head."""

    config_class = RetNetConfig
    mixer = MultiScaleRetention


class HGRN2ForCausalLM(LinearAttentionForCausalLM):
    """HGRN2 with a head."""

    config_class = HGRN2Config
    mixer = HGRN2Attention


class HGRNForCausalLM(LinearAttentionForCausalLM):
    """HGRN with a head."""

    config_class = HGRNConfig
    mixer = HGRNAttention


class KDAForCausalLM(LinearAttentionForCausalLM):
    """Kimi Delta Attention with a head."""

    config_class = KDAConfig
    mixer = KimiDeltaAttention


class GatedDeltaProductForCausalLM(LinearAttentionForCausalLM):
    """Gated DeltaProduct with a head."""

    config_class = GatedDeltaProductConfig
    mixer = GatedDeltaProduct


class RWKV7ForCausalLM(LinearAttentionForCausalLM):
    """RWKV7 with a head."""

    config_class = RWKV7Config
    mixer = RWKV7Attention
    block = RWKV7Block


class RWKV6ForCausalLM(LinearAttentionForCausalLM):
    """RWKV6 with a head."""

    config_class = RWKV6Config
    mixer = RWKV6Attention
    block = RWKV6Block


class LightNetForCausalLM(LinearAttentionForCausalLM):
    """LightNet with a head."""

    config_class = LightNetConfig
    mixer = LightNetAttention


MODELS: tuple[type[LinearAttentionForCausalLM], ...] = (
    DeltaNetForCausalLM, GLAForCausalLM, GatedDeltaNetForCausalLM, GatedDeltaProductForCausalLM, HGRN2ForCausalLM,
    HGRNForCausalLM, KDAForCausalLM, LightNetForCausalLM, RWKV6ForCausalLM, RWKV7ForCausalLM, RetNetForCausalLM,
)  # fmt: skip
