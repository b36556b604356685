"""The configurations of fla 0.6.0. Fields that steer only training or the choice of a kernel are kept, not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from quamba.errors import UserError


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention in the place of the recurrent mixer; window counts the token itself."""

    num_heads: int
    num_kv_heads: int
    qkv_bias: bool
    window_size: int | None
    rope_theta: float


class LinearAttentionConfig(PreTrainedConfig):
    """What all families share. attn: one dict or several, each with the layers that have softmax attention."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    crosses: ClassVar[bool] = False
    """Whether a layer reads what an earlier one left: softmax attention then has no place among them."""

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    vocab_size: int = 32000
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    attn: Any = None
    attnres_block_size: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    activations: ClassVar[tuple[str, ...]] = ("swish", "silu")

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.attnres_block_size is not None:
            raise UserError(
                f"{self.model_type} config has attnres_block_size={self.attnres_block_size!r}; supported is None: a "
                "residual stream that is a plain sum"
            )
        if self.hidden_act not in self.activations:
            raise UserError(
                f"{self.model_type} config has hidden_act={self.hidden_act!r}; supported is "
                f"{' or '.join(map(repr, self.activations))}"
            )
        self.attention_of(-1)

    def attention_of(self, layer: int) -> AttentionSpec | None:
        """The softmax attention of a layer, None where the recurrent mixer stands.

        Raises UserError for an ``attn`` that cannot be read, whichever layer is asked for.
        """
        specs = self.attn or [] if isinstance(self.attn, (list, type(None))) else [self.attn]
        taken: set[int] = set()
        found = None
        for spec in specs:
            if not (isinstance(spec, dict) and isinstance(spec.get("layers"), list) and spec.get("num_heads")):
                wanted = "a list of layers and num_heads"
                raise UserError(f"{self.model_type} config has attn={self.attn!r}; expected are {wanted}")
            layers = set(spec["layers"])
            if not layers <= set(range(self.num_hidden_layers)) - taken:
                raise UserError(
                    f"{self.model_type} config has attn layers {sorted(layers)}; expected are layers of 0 to "
                    f"{self.num_hidden_layers - 1}, each once"
                )
            if self.crosses and layers:
                raise UserError(
                    f"{self.model_type} config has attn layers {sorted(layers)}, but what its layers hand on to later "
                    "ones is not defined for softmax attention; use attn=null"
                )
            taken |= layers
            if layer in layers:
                heads = spec["num_heads"]
                found = AttentionSpec(
                    heads, spec.get("num_kv_heads") or heads, bool(spec.get("qkv_bias", False)),
                    spec.get("window_size"), self.rope_theta_of(spec),
                )  # fmt: skip
        return found

    def rope_theta_of(self, spec: dict[str, Any]) -> float:
        """The base of the rotary frequencies of an ``attn`` entry."""
        return float(spec.get("rope_theta") or 10000.0)

    @property
    def layer_types(self) -> list[str]:
        """As transformers names what a layer keeps between tokens."""
        kinds = (self.attention_of(layer) for layer in range(self.num_hidden_layers))
        return ["linear_attention" if kind is None else "full_attention" for kind in kinds]

    @property
    def lower_bounds(self) -> tuple[int, int] | None:
        """The shape of the table of least forget gates, where the family has one."""
        return None

    @property
    def mlp_size(self) -> int:
        """Channels between the projections of an MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return -(-int(self.hidden_size * ratio * 2 / 3) // 256) * 256

    def whole(self, name: str) -> int:
        """hidden_size times the ratio of that name, to be split over the heads. Raises UserError where it cannot be."""
        ratio, heads = getattr(self, name), getattr(self, "num_heads", 1)
        size = self.hidden_size * ratio
        if abs(size - round(size)) > 1e-6 or round(size) % heads:
            raise UserError(
                f"{self.model_type} config has hidden_size={self.hidden_size} and {name}={ratio}; expected is a "
                f"product that num_heads={heads} divides"
            )
        return round(size)


class GatedDeltaNetConfig(LinearAttentionConfig):
    """Gated DeltaNet."""

    model_type = "gated_deltanet"
    num_hidden_layers: int = 21
    num_heads: int = 6
    num_v_heads: int | None = None
    head_dim: int = 256
    expand_v: float = 2.0
    use_gate: bool = True
    output_gate_activation: str = "swish"
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False


class DeltaNetConfig(LinearAttentionConfig):
    """DeltaNet."""

    model_type = "delta_net"
    num_heads: int = 16
    expand_k: float = 1.0
    expand_v: float = 1.0
    use_gate: bool = False
    use_beta: bool = True
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False
    qk_norm: str = "l2"
    qk_activation: str = "silu"


class GLAConfig(LinearAttentionConfig):
    """Gated linear attention."""

    model_type = "gla"
    gate_rank: ClassVar[int] = 16
    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    elementwise_affine: bool = True
    fuse_norm: bool = True


class RetNetConfig(LinearAttentionConfig):
    """Retention."""

    model_type = "retnet"
    hidden_ratio: float | None = 2
    num_heads: int = 8
    num_kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    feature_map: str | None = None
    use_output_gate: bool = True
    elementwise_affine: bool = True
    fuse_norm: bool = True


class HGRN2Config(LinearAttentionConfig):
    """HGRN2."""

    model_type = "hgrn2"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    elementwise_affine: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_heads, self.expand_ratio = heads_and_size(self)

    @property
    def lower_bounds(self) -> tuple[int, int] | None:
        return (self.num_hidden_layers, self.hidden_size) if self.use_lower_bound else None


class HGRNConfig(LinearAttentionConfig):
    """HGRN."""

    model_type = "hgrn"
    expand_ratio: float = 1
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    elementwise_affine: bool = True

    @property
    def lower_bounds(self) -> tuple[int, int] | None:
        return (self.num_hidden_layers, int(self.hidden_size * self.expand_ratio)) if self.use_lower_bound else None


class KDAConfig(LinearAttentionConfig):
    """Kimi Delta Attention."""

    model_type = "kda"
    num_heads: int = 16
    num_v_heads: int | None = None
    head_dim: int = 128
    expand_v: float = 1.0
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False
    lower_bound: float | None = None


class GatedDeltaProductConfig(LinearAttentionConfig):
    """Gated DeltaProduct, and DeltaProduct without its forget gate."""

    model_type = "gated_deltaproduct"
    num_hidden_layers: int = 21
    num_heads: int = 6
    head_dim: int = 256
    expand_v: float = 2.0
    use_output_gate: bool = True
    use_forget_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False
    num_householder: int = 1


class RWKVConfig(LinearAttentionConfig):
    """What RWKV6 and RWKV7 share."""

    ratio: ClassVar[float]
    """hidden_ratio where the config gives none."""
    activations: ClassVar[tuple[str, ...]] = ("sqrelu",)
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * (self.hidden_ratio or self.ratio)) // 32) * 32


class RWKV6Config(RWKVConfig):
    """RWKV6."""

    model_type = "rwkv6"
    ratio: ClassVar[float] = 3.5
    hidden_ratio: float | None = 3.5
    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64


class RWKV7Config(RWKVConfig):
    """RWKV7."""

    model_type = "rwkv7"
    ratio: ClassVar[float] = 4
    crosses: ClassVar[bool] = True
    head_dim: int | None = 64
    num_heads: int | None = None
    value_dim: int | list[int] | None = None
    decay_low_rank_dim: int = 64
    gate_low_rank_dim: int = 128
    a_low_rank_dim: int = 64
    v_low_rank_dim: int = 16
    fuse_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // (self.num_heads or 1)
        self.num_heads = self.hidden_size // self.head_dim
        if not isinstance(self.value_dim, list):
            self.value_dim = [self.value_dim or self.hidden_size] * self.num_hidden_layers


class LightNetConfig(LinearAttentionConfig):
    """LightNet."""

    model_type = "lightnet"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    gate_low_rank_dim: int = 128
    elementwise_affine: bool = True

    def rope_theta_of(self, spec: dict[str, Any]) -> float:
        """fla hands no rope_theta to LightNet's attention."""
        return 10000.0

    @property
    def heads_and_size(self) -> tuple[int, int]:
        """Heads and key size per head. Raises UserError when neither is given."""
        if self.num_heads is not None and self.expand_ratio is not None:
            return self.num_heads, self.expand_ratio
        return heads_and_size(self)


def heads_and_size(config: Any) -> tuple[int, int]:
    """Heads and key size per head, where either may be left out. Raises UserError when both are."""
    if config.expand_ratio is not None:
        return config.hidden_size // config.expand_ratio, config.expand_ratio
    if config.num_heads is None:
        raise UserError(f"{config.model_type} config gives neither num_heads nor expand_ratio; give one of them")
    return config.num_heads, config.hidden_size // config.num_heads


CONFIGS: tuple[type[LinearAttentionConfig], ...] = (
    DeltaNetConfig, GLAConfig, GatedDeltaNetConfig, GatedDeltaProductConfig, HGRN2Config, HGRNConfig, KDAConfig,
    LightNetConfig, RWKV6Config, RWKV7Config, RetNetConfig,
)  # fmt: skip
