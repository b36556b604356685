"""`quamba.compare`: how far two models lie apart on the same text, block by block, and where they first part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from quamba import embedded
from quamba.errors import UserError
from quamba.inspection.opened import Opened
from quamba.windows import read_text

Progress = Callable[[str, int, int], None]
WINDOW = 512
"""Tokens that are read together; the next window starts afresh."""
PROMPT = 32
"""Tokens of the text that are continued where no prompt is given."""
ROWS = 128
"""Tokens whose distributions are held in fp64 at once."""


@dataclass(frozen=True)
class Divergence:
    """Where greedy decoding first differs. position: 0 for the first new token. common: the new text until then.
    a, b: the token of each model as text, "" where it had ended; a_id, b_id: its number, None where it had ended."""

    position: int
    common: str
    a: str
    b: str
    a_id: int | None
    b_id: int | None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found, model A being the reference.

    layer_errors: ||b - a|| / ||a|| of the residual stream after each block, over all tokens and channels. kl_mean,
    kl_p99: mean and 99th percentile over tokens of KL(A || B) of the next token's distribution, in nats.
    top1_agreement: the share of tokens after which both find the same token likeliest. new_tokens: how many were
    decoded; divergence: None where all of them agree.
    """

    a: str
    b: str
    text: str
    tokens: int
    layer_errors: tuple[float, ...]
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    prompt: str
    new_tokens: int
    divergence: Divergence | None

    def as_dict(self) -> dict[str, Any]:
        """What `quamba compare --json` writes."""
        return {**asdict(self), "layer_errors": list(self.layer_errors)}


@torch.inference_mode()
def compare(
    a: str | Path,
    b: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = 2048,
    prompt: str | None = None,
    max_new_tokens: int = 64,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Comparison:
    """Run two models (each an original or a quantised one) on the same text; A is the reference.

    text: a UTF-8 file, None for the embedded validation text; its first ``tokens`` tokens are read in windows of
    WINDOW. prompt: what both continue greedily by max_new_tokens (0 leaves that out); None takes the text's first
    PROMPT tokens. A rotated residual stream is rotated back before it is compared. Raises UserError for models of
    different structure or vocabulary, for a text that is too short and for an empty prompt.
    """
    if tokens < 2 or max_new_tokens < 0:
        raise UserError(f"at least 2 tokens of text and 0 new ones are needed, got {tokens} and {max_new_tokens}")
    path, tell = Path(text or embedded.validation_text()), progress or (lambda phase, done, total: None)
    words = read_text(path)
    pair = Opened(a, device, dtype), Opened(b, device, dtype)
    _check_alike(*pair)
    ids = _tokens(pair, words, tokens, path)
    errors, kl, same = _read(pair, ids, tell)
    start = ids[:PROMPT] if prompt is None else _tokens(pair, prompt, None, "the prompt")
    divergence = _diverge(pair, start, max_new_tokens, tell) if max_new_tokens else None
    return Comparison(
        str(a), str(b), str(path), len(ids), errors, float(kl.mean()), float(kl.quantile(0.99)), same,
        pair[0].tokenizer.decode(start) if prompt is None else prompt, max_new_tokens, divergence,
    )  # fmt: skip


def _check_alike(a: Opened, b: Opened) -> None:
    shapes = [(len(o.spec.blocks), o.spec.d_model, o.spec.vocab) for o in (a, b)]
    if shapes[0] != shapes[1]:
        said = [f"{layers} layers of width {width} and {vocab} tokens" for layers, width, vocab in shapes]
        raise UserError(f"only models of one shape can be compared; {a.checkpoint.source} has {said[0]}, "
                        f"{b.checkpoint.source} {said[1]}")  # fmt: skip


def _tokens(pair: tuple[Opened, Opened], words: str, count: int | None, origin: Any) -> torch.Tensor:
    """The first ``count`` tokens of a text, int64 [count]; None takes a prompt whole, with the special tokens that the
    tokenizer puts before it."""
    special = count is None
    found = [o.tokenizer(words, add_special_tokens=special, verbose=False)["input_ids"][:count] for o in pair]
    if found[0] != found[1]:
        sources = " and ".join(o.checkpoint.source for o in pair)
        raise UserError(f"{sources} have different tokenizers; only models that read the same tokens can be compared")
    if not found[0]:
        raise UserError(f"{origin} is empty; give at least one word to continue")
    if count is not None and len(found[0]) < count:
        raise UserError(f"{origin} has {len(found[0])} tokens, fewer than the {count} asked for; "
                        "give more text or fewer --tokens")  # fmt: skip
    return torch.tensor(found[0])


def _read(
    pair: tuple[Opened, Opened], ids: torch.Tensor, tell: Progress
) -> tuple[tuple[float, ...], torch.Tensor, float]:
    """Relative error of the stream after each block, KL of every token fp64 [T], share of equal top tokens."""
    layers = len(pair[0].spec.blocks)
    squares, total, kls, same = [0.0] * layers, [0.0] * layers, [], 0
    for start in range(0, len(ids), WINDOW):
        tell("text", start, len(ids))
        window = ids[start : start + WINDOW]
        (hidden_a, logits_a), (hidden_b, logits_b) = (_run(o, window) for o in pair)
        for layer in range(layers):
            want, got = (o.upright(h[layer]) for o, h in zip(pair, (hidden_a, hidden_b), strict=True))
            squares[layer] += float((got - want).square().sum())
            total[layer] += float(want.square().sum())
        for part_a, part_b in zip(logits_a.split(ROWS), logits_b.split(ROWS), strict=True):
            kls.append(divergence(part_a, part_b))
        same += int((logits_a.argmax(-1) == logits_b.argmax(-1)).sum())
    tell("text", len(ids), len(ids))
    errors = tuple((s / t) ** 0.5 if t else 0.0 for s, t in zip(squares, total, strict=True))
    return errors, torch.cat(kls).cpu(), same / len(ids)


def _run(opened: Opened, window: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The stream after each block [T, D] and the logits [T, V] of one window int64 [T]."""
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as undo:
        for block in opened.spec.blocks:
            undo.callback(opened.model.get_submodule(block.path).register_forward_hook(see).remove)
        logits = opened.model(window[None].to(opened.model.device), use_cache=False).logits
    return [hidden[0] for hidden in seen], logits[0]


def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL(A || B) in nats of the distributions of logits [T, V]; fp64 [T]."""
    log_a, log_b = (logits.double().log_softmax(-1) for logits in (a, b))
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _diverge(pair: tuple[Opened, Opened], start: torch.Tensor, count: int, tell: Progress) -> Divergence | None:
    new: list[list[int]] = []
    for index, opened in enumerate(pair):
        tell("decoding", index, len(pair))
        new.append(_greedy(opened, start, count))
    tell("decoding", len(pair), len(pair))
    decode = cast(Callable[..., str], pair[0].tokenizer.decode)
    for position in range(max(map(len, new))):
        a, b = (tokens[position] if position < len(tokens) else None for tokens in new)
        if a != b:
            told_a, told_b = ("" if token is None else decode([token]) for token in (a, b))
            return Divergence(position, decode(new[0][:position]), told_a, told_b, a, b)
    return None


def _greedy(opened: Opened, start: torch.Tensor, count: int) -> list[int]:
    tokenizer, ids = opened.tokenizer, start[None].to(opened.model.device)
    # Explicit, because the checkpoint's generation_config may ask for sampling of its own.
    output = opened.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, temperature=None,
        top_p=None, top_k=None,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )  # fmt: skip
    found: list[int] = output[0, len(start) :].tolist()
    return found
