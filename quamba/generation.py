"""Streaming text generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from quamba.decoding import Continuation
from quamba.errors import UserError
from quamba.sampling import Sampler

CHECK_EVERY = 8
"""On CUDA the host looks at the tokens after so many steps: it waits for the device then, and only then."""


class Generator:
    """Continue batches of prompts with one model; the graph of a batch size and a way of sampling is kept.

    stop: ids that end a sequence; pad: what follows them. The tokens do not depend on whether steps are captured.
    """

    def __init__(self, model: Any, *, stop: Sequence[int] = (), pad: int = 0, capture: bool = True) -> None:
        self.model, self.stop, self.pad, self.capture = model, tuple(stop), pad, capture
        self._kept: dict[tuple[int, float, float], Continuation] = {}

    def continuation(self, batch: int, room: int, temperature: float, top_p: float) -> Continuation:
        """The continuation for a batch size, made anew when ``room`` tokens do not fit the one that is kept."""
        key = batch, temperature, top_p
        if key not in self._kept or self._kept[key].room < room:
            sampler = Sampler(temperature, top_p, device=self.model.device)
            self._kept[key] = Continuation(
                self.model, batch, room=room, sampler=sampler, stop=self.stop, pad=self.pad, capture=self.capture
            )
        return self._kept[key]

    @torch.inference_mode()
    def pieces(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[torch.Tensor]:
        """Yield new tokens int64 [B, n] on the CPU as they come, until every sequence has stopped.

        ids [B, T] with mask [B, T], 0 for padding on the left; sequences that stopped earlier go on with ``pad``.
        """
        text = self.continuation(ids.shape[0], max_new_tokens, temperature, top_p)
        text.sampler.restart(seed)
        text.begin(ids, mask)
        every, seen = CHECK_EVERY if self.model.device.type == "cuda" else 1, 0
        while True:
            new = text.tokens[:, seen : text.count].cpu()
            last = self._last(text.finished, new, text.count == max_new_tokens)
            yield new if last is None else new[:, :last]
            if last is not None:
                return
            seen = text.count
            for _ in range(min(every, max_new_tokens - text.count)):
                text.step()

    def _last(self, finished: torch.Tensor, new: torch.Tensor, full: bool) -> int | None:
        """How many of the new tokens [B, n] count, None if there are more to come."""
        if not bool(finished.all()):
            return new.shape[1] if full else None
        stopped = (new.unsqueeze(-1) == torch.tensor(self.stop)).any(-1)
        first = torch.where(stopped.any(1), stopped.int().argmax(1), -1)  # -1: it stopped in an earlier piece
        return int(first.max()) + 1


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = False,
) -> str:
    """Return `prompt` and its continuation by at most `max_new_tokens` tokens.

    Greedy if `temperature` is 0; otherwise tokens are drawn from the smallest set whose probability reaches `top_p`,
    by random numbers that `seed` determines. `stream` also prints the text to stdout, word by word. On CUDA the steps
    are replays of one graph. Raises UserError for an empty prompt and for values out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"At least 1 new token is needed, and {max_new_tokens} were asked for.")
    if temperature < 0:
        raise UserError(f"The temperature is 0 (greedy) or above, and {temperature} was given.")
    if not 0 < top_p <= 1:
        raise UserError(f"top-p is a probability above 0 and at most 1, and {top_p} was given.")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("The prompt is empty; give at least one word to continue.")

    generator = Generator(model, stop=stop_ids(model, tokenizer))
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    text = [ids]
    for piece in generator.pieces(
        ids.to(model.device), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    ):
        if streamer is not None:
            if len(text) == 1:  # not before what follows has found its memory
                streamer.put(ids)
            for token in piece[0]:
                streamer.put(token.view(1))
        text.append(piece)
    if streamer is not None:
        streamer.end()
    return cast(str, tokenizer.decode(torch.cat(text, 1)[0], skip_special_tokens=True))


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text: as the generation config says, else the tokenizer's."""
    wanted = model.generation_config.eos_token_id
    wanted = tokenizer.eos_token_id if wanted is None else wanted
    return list(wanted) if isinstance(wanted, list) else [] if wanted is None else [cast(int, wanted)]
