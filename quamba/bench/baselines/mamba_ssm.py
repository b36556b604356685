"""The mamba-ssm package, through its public interface, its prefill and its step captured in CUDA graphs.

Its ``generate(cg=True)`` captures the same call; here it stands alone, so that it is timed as ours is. The variant
``mamba-ssm-fixed-a`` spares it the kernels that compute A = -exp(A_log) anew in every layer of every step.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from quamba.bench.contender import Baseline, Contender
from quamba.bench.materialise import stored_bytes
from quamba.bench.request import Request
from quamba.bench.source import Source
from quamba.decoding import Captured
from quamba.errors import UserError
from quamba.models import describe
from quamba.models.spec import MixerSpec


class MambaSsm(Contender):
    """mamba_ssm.MambaLMHeadModel."""

    def __init__(self, model: Any, dtype: torch.dtype, recipe: str) -> None:
        self.model, self.dtype, self.recipe = model, dtype, recipe
        self.weight_bytes = stored_bytes(model)

    def request(self, ids: torch.Tensor, generate: int) -> Request:
        return MambaSsmRequest(self.model, ids, generate, self.dtype)


class MambaSsmRequest(Request):
    """States lie in ``inference_params.key_value_memory_dict`` and are updated in place."""

    def __init__(self, model: Any, ids: torch.Tensor, generate: int, dtype: torch.dtype) -> None:
        from mamba_ssm.utils.generation import InferenceParams

        batch, prompt = ids.shape
        length = prompt + generate
        self.model, self.ids = model, ids
        self.params = InferenceParams(
            max_seqlen=length,
            max_batch_size=batch,
            key_value_memory_dict=model.allocate_inference_cache(batch, length, dtype=dtype),
        )
        self.next = torch.zeros(batch, 1, dtype=torch.int64, device=ids.device)
        self._prefill = Captured(lambda: self._forward(self.ids, 0), capture=False, eager=2)
        self._step = Captured(lambda: self._forward(self.next, prompt), capture=False)
        self.captured = (self._prefill, self._step)

    def prefill(self) -> torch.Tensor:
        return self._prefill()

    def step(self) -> torch.Tensor:
        return self._step()

    def _forward(self, ids: torch.Tensor, seen: int) -> torch.Tensor:
        self.params.seqlen_offset = seen  # only whether it is 0 matters to a recurrent layer
        logits: torch.Tensor = self.model(ids, inference_params=self.params, num_last_tokens=1).logits[:, -1]
        self.next.copy_(logits.argmax(-1, keepdim=True))
        return logits

    @property
    def state_bytes(self) -> int:
        states = [t for layer in self.params.key_value_memory_dict.values() for t in layer]
        return sum(t.numel() * t.element_size() for t in states) // len(self.ids)


class LogOfConstant:
    """Stands for A_log: -torch.exp(A_log.float()) is a constant, and costs nothing."""

    def __init__(self, A: torch.Tensor) -> None:
        self.A = A

    def float(self) -> LogOfConstant:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.exp and isinstance(args[0], cls):
            return Negative(args[0].A)
        return NotImplemented


class Negative:
    """Something whose negative is A."""

    def __init__(self, A: torch.Tensor) -> None:
        self.A = A

    def __neg__(self) -> torch.Tensor:
        return self.A


def fix_A(model: Any) -> None:
    """Let every mixer find its A ready."""
    for mixer in [m for m in model.modules() if "A_log" in m._parameters]:
        A = -torch.exp(mixer.A_log.detach().float())
        del mixer.A_log
        mixer.A_log = LogOfConstant(A)


def _layer(mixer: MixerSpec) -> dict[str, Any]:
    """The package's ``ssm_cfg`` for a mixer."""
    s = mixer.sizes
    shared = {"d_state": s["N"], "d_conv": s["W"], "expand": s["I"] // s["D"], "conv_bias": mixer.conv_bias}
    special: dict[str, Any] = {
        "selective": {"layer": "Mamba1", "dt_rank": s.get("R")},
        "ssd": {"layer": "Mamba2", "headdim": s.get("P"), "ngroups": s.get("G")},
    }
    return {**shared, **special[mixer.scan.family if mixer.scan else ""]}


def why_not(device: torch.device) -> str | None:
    """What is missing, in a few words."""
    if find_spec("mamba_ssm") is None:
        return "needs the package mamba_ssm, which is not installed"
    return None if device.type == "cuda" else "runs on a GPU only"


def mamba_ssm(source: Source, dtype: torch.dtype, device: torch.device) -> Contender:
    """A fresh model of the source's sizes. Raises UserError for a model that is more than its mixers."""
    spec = describe(source.config)
    if spec.hosted:
        raise UserError(f"The baseline 'mamba-ssm' has no layers as those of {source.name}; leave it out.")
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(
        d_model=spec.d_model, n_layer=len(spec.blocks), vocab_size=spec.vocab, pad_vocab_size_multiple=1,
        ssm_cfg=_layer(spec.blocks[0].sublayers[0].mixer), rms_norm=True, fused_add_norm=True,
        residual_in_fp32=spec.residual_fp32, tie_embeddings=bool(source.config.tie_word_embeddings),
    )  # fmt: skip
    model = MambaLMHeadModel(config, device=device, dtype=dtype).eval()
    return MambaSsm(model, dtype, "mamba-ssm")


def mamba_ssm_fixed_a(source: Source, dtype: torch.dtype, device: torch.device) -> Contender:
    """As mamba_ssm, with A computed once."""
    contender = mamba_ssm(source, dtype, device)
    assert isinstance(contender, MambaSsm)
    fix_A(contender.model)
    contender.recipe = "mamba-ssm-fixed-a"
    return contender


BASELINES = {
    "mamba-ssm": Baseline(mamba_ssm, why_not),
    "mamba-ssm-fixed-a": Baseline(mamba_ssm_fixed_a, why_not),
}
