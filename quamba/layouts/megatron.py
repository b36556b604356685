"""Megatron-LM's own checkpoints of Mamba2 models, as NVIDIA's mamba2-8b-3t-4k comes: a file for each tensor-parallel
(and pipeline) rank, ``release/mp_rank_00/model_optim_rng.pt``, holding the weights and the arguments of the training.

Each rank holds its share of the heads and state groups, [z | x | B | C | dt] and [x | B | C] one after the other, so
shares are merged piece by piece. Sizes are read from the shapes; only the number of groups has to be told.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config

from quamba.errors import UserError
from quamba.layouts import pickles
from quamba.layouts.layout import Index, Layout, Stored, made
from quamba.layouts.pickles import Mapped

LATEST, SHARD = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
GROUPS = 8
"""State groups where the arguments do not tell: the only number that the code of the public models has."""
EPS = 1e-5
"""Of the gated norm; no argument changes it."""
FOREIGN = ("megatron.", "numpy.", "_codecs.encode", "_io.BytesIO")
"""How the names begin of what training leaves in the file beside the weights."""

WHOLE, ROWS, COLUMNS, ZXBCDT, XBC = "whole", "rows", "columns", "zxBCdt", "xBC"
LAYER = {
    "norm.weight": ("norm.weight", WHOLE),
    "mixer.in_proj.layer_norm_weight": ("norm.weight", WHOLE),
    "mixer.in_proj.weight": ("mixer.in_proj.weight", ZXBCDT),
    "mixer.conv1d.weight": ("mixer.conv1d.weight", XBC),
    "mixer.conv1d.bias": ("mixer.conv1d.bias", XBC),
    "mixer.A_log": ("mixer.A_log", ROWS),
    "mixer.D": ("mixer.D", ROWS),
    "mixer.dt_bias": ("mixer.dt_bias", ROWS),
    "mixer.norm.weight": ("mixer.norm.weight", ROWS),
    "mixer.out_proj.weight": ("mixer.out_proj.weight", COLUMNS),
}
"""Name below a layer -> transformers' name below it, and how the ranks share the tensor."""
EMBEDDING, HEAD, FIRST = "backbone.embeddings.weight", "lm_head.weight", "backbone.layers.0."
OUTSIDE = {
    "embedding.word_embeddings.weight": (EMBEDDING, ROWS),
    "decoder.final_norm.weight": ("backbone.norm_f.weight", WHOLE),
    "output_layer.weight": (HEAD, ROWS),
}


@dataclass(frozen=True)
class Shares:
    """A tensor as the ranks of one stage hold it, all under one name and in one shape."""

    ranks: list[Mapped]
    name: str
    how: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one share."""
        return self.ranks[0].shapes[self.name]

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the merged tensor."""
        shape, axis = list(self.shape), {WHOLE: None, COLUMNS: 1}.get(self.how, 0)
        if axis is not None:
            shape[axis] *= len(self.ranks)
        return tuple(shape)

    def merged(self, sizes: Sizes) -> torch.Tensor:
        """The whole tensor."""
        parts = [rank.tensor(self.name) for rank in self.ranks[: 1 if self.how == WHOLE else None]]
        if len(parts) == 1:
            return parts[0]
        if self.how == COLUMNS:
            return torch.cat(parts, 1)
        rows = sizes.rows(self.how, len(parts))
        pieces = [part.split(rows) if rows else (part,) for part in parts]
        return torch.cat([torch.cat(piece) for piece in zip(*pieces, strict=True)])


@dataclass(frozen=True)
class Sizes:
    """Of the whole model: vocabulary, d_model; of a layer: d_inner, heads, state groups, d_state, convolution width."""

    vocab: int
    hidden: int
    inner: int
    heads: int
    groups: int
    state: int
    width: int

    def rows(self, how: str, ranks: int) -> list[int]:
        """How many rows of a rank's share belong to each piece; none where it is one piece."""
        key = self.groups * self.state
        whole = {ZXBCDT: [self.inner, self.inner, key, key, self.heads], XBC: [self.inner, key, key]}
        return [rows // ranks for rows in whole.get(how, [])]


def folder(path: Path) -> Path:
    """Where the ranks' folders are: in the iteration that the tracker names, or here. Raises UserError."""
    if not (path / LATEST).is_file():
        return path
    named = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if named != "release" and not re.fullmatch(r"[0-9]{1,9}", named):
        raise UserError(f"{path / LATEST} should hold an iteration or the word release, and holds {named[:40]!r}")
    return path / (named if named == "release" else f"iter_{int(named):07d}")


def matches(path: Path) -> bool:
    """The tracker of the latest iteration, or the folders of the ranks."""
    return (path / LATEST).is_file() or any(path.glob(f"mp_rank_*/{SHARD}"))


def ranks(path: Path) -> list[list[Path]]:
    """The files, [pipeline stage][tensor-parallel rank]. Raises UserError when there is none, or one is missing."""
    found: dict[tuple[int, int], Path] = {}
    for file in folder(path).glob(f"mp_rank_*/{SHARD}"):
        rank = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", file.parent.name)
        if rank:
            found[int(rank[2] or 0), int(rank[1])] = file
    if not found:
        raise UserError(f"{folder(path)} has no mp_rank_00/{SHARD}; other formats of Megatron-LM are not read")
    stages, shares = (max(numbers) + 1 for numbers in zip(*found, strict=True))
    if len(found) != stages * shares:
        raise UserError(f"{folder(path)} has {len(found)} of the {stages * shares} ranks that its names tell of")
    return [[found[stage, share] for share in range(shares)] for stage in range(stages)]


def opened(file: Path) -> dict[str, Any]:
    """What a rank's file holds, mapped. Raises UserError when there are no weights in it."""
    held = pickles.open_pickle(file, [argparse.Namespace], FOREIGN)
    if not isinstance(held, dict) or not isinstance(held.get("model"), dict):
        raise UserError(f"{file} should hold a dict with the weights under 'model'")
    return held


def weights(held: dict[str, Any]) -> dict[str, Any]:
    """The state dict without what Transformer Engine adds to it."""
    return {name: tensor for name, tensor in held["model"].items() if not str(name).endswith("_extra_state")}


def reopened(file: Path) -> dict[str, Any]:
    """The state dict of a rank, mapped anew."""
    return weights(opened(file))


def scan(path: Path) -> tuple[dict[str, Shares], Sizes, argparse.Namespace]:
    """transformers' name -> shares, the sizes, and the arguments of the training.

    Raises UserError for what is broken, and for what transformers' mamba2 cannot represent.
    """
    found: dict[str, Shares] = {}
    layers, arguments = 0, None
    for files in ranks(path):
        stage = []
        for file in files:
            held = opened(file)
            arguments = arguments or held.get("args")
            stage.append(Mapped(file, weights(held), partial(reopened, file)))
            if stage[-1].shapes != stage[0].shapes:
                raise UserError(f"{file} should hold tensors of the names and shapes of {files[0]}, and does not")
        for name, shape in stage[0].shapes.items():
            today, how = _today(files[0], name, layers)
            if len(shape) < {WHOLE: 0, COLUMNS: 2}.get(how, 1):
                raise UserError(f"tensor {name!r} of {files[0]} has {len(shape)} axes, which are too few")
            found[today] = Shares(stage, name, how)
        layers = len({name for name in found if name.endswith(".A_log")})
    if not isinstance(arguments, argparse.Namespace):
        arguments = argparse.Namespace()
    for name, wanted in (
        ("normalization", "RMSNorm"), ("norm_epsilon", EPS), ("layernorm_epsilon", EPS), ("apply_layernorm_1p", False),
    ):  # fmt: skip
        if getattr(arguments, name, None) not in (None, wanted):
            value = getattr(arguments, name)
            raise UserError(f"{path} was trained with {name}={value!r}; only {wanted!r} can be represented")
    return found, _sizes(path, found, arguments), arguments


def _today(file: Path, name: str, before: int) -> tuple[str, str]:
    """transformers' name and how it is shared, where ``before`` layers belong to earlier stages."""
    layer = re.fullmatch(r"decoder\.layers\.(\d{1,9})\.(.+)", name)
    if layer and layer[2] in LAYER:
        today, how = LAYER[layer[2]]
        return f"backbone.layers.{before + int(layer[1])}.{today}", how
    if name not in OUTSIDE:
        raise UserError(f"{file} holds {name!r}, which is no part of a Mamba2 model, and nothing else can be converted")
    return OUTSIDE[name]


def _sizes(path: Path, found: dict[str, Shares], arguments: argparse.Namespace) -> Sizes:
    def whole(name: str, dims: int) -> tuple[int, ...]:
        if name not in found or len(found[name].whole) != dims or 0 in found[name].whole:
            raise UserError(f"{path} should hold a Mamba2 model, but {name!r} is missing or not of {dims} axes")
        return found[name].whole

    vocab, hidden = whole(EMBEDDING, 2)
    heads, inner = whole(f"{FIRST}mixer.A_log", 1)[0], whole(f"{FIRST}mixer.out_proj.weight", 2)[1]
    channels, _, width = whole(f"{FIRST}mixer.conv1d.weight", 3)
    told = getattr(arguments, "mamba_num_groups", None)
    groups = told if isinstance(told, int) and told > 0 else GROUPS
    state, rest = divmod(channels - inner, 2 * groups)
    if inner % heads or heads % groups or rest or state < 1:
        raise UserError(
            f"{path} has {heads} heads, d_inner {inner} and {channels} convolution channels, "
            f"which do not fit {groups} state groups"
        )
    sizes = Sizes(vocab, hidden, inner, heads, groups, state, width)
    for name, shares in found.items():
        rows = sizes.rows(shares.how, len(shares.ranks))
        if rows and sum(rows) != shares.shape[0]:
            raise UserError(f"{path}: a rank's share of {name!r} should have {sum(rows)} rows, is {list(shares.shape)}")
    return sizes


def config(path: Path) -> Any:
    """Raises UserError as ``scan`` does."""
    found, sizes, arguments = scan(path)
    return made(
        Mamba2Config, path, vocab_size=sizes.vocab, hidden_size=sizes.hidden,
        num_hidden_layers=len({name for name in found if name.endswith(".A_log")}), num_heads=sizes.heads,
        head_dim=sizes.inner // sizes.heads, expand=sizes.inner // sizes.hidden, n_groups=sizes.groups,
        state_size=sizes.state, conv_kernel=sizes.width, use_bias=False,
        use_conv_bias=f"{FIRST}mixer.conv1d.bias" in found, layer_norm_epsilon=EPS,
        residual_in_fp32=bool(getattr(arguments, "fp32_residual_connection", False)),
        tie_word_embeddings=HEAD not in found, dtype=found[EMBEDDING].ranks[0].types[found[EMBEDDING].name],
    )  # fmt: skip


def index(path: Path) -> Index:
    """The merged tensors under transformers' names."""
    found, sizes, _ = scan(path)
    return {name: Stored(shares.whole, partial(shares.merged, sizes)) for name, shares in found.items()}


LAYOUT = Layout(
    name="megatron",
    sign=f"{LATEST} or mp_rank_00/{SHARD} (Megatron-LM)",
    matches=matches,
    config=config,
    index=index,
)
