"""Streaming text generation."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from quamba.errors import UserError


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
    with the global random state of torch seeded by `seed`. `stream` also prints the text to stdout, word by word.
    Raises UserError for an empty prompt and for values out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"At least 1 new token is needed, and {max_new_tokens} were asked for.")
    if temperature < 0:
        raise UserError(f"The temperature is 0 (greedy) or above, and {temperature} was given.")
    if not 0 < top_p <= 1:
        raise UserError(f"top-p is a probability above 0 and at most 1, and {top_p} was given.")
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("The prompt is empty; give at least one word to continue.")

    # Explicit, because the checkpoint's generation_config may ask for sampling of its own. top_k 0 is no limit.
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = cast(Any, model).generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
            **(sampling if temperature else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
        )
    return cast(str, tokenizer.decode(output[0], skip_special_tokens=True))
