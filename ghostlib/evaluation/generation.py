"""Greedy continuation of prompts and chats, in padded batches."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlib.common import at_least, checked
from ghostlib.models.architectures import check_model
from ghostlib.models.placement import input_device
from ghostlib.models.streams import evaluating

Message = dict[str, str]  # {"role": "user", "content": …}


@checked
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 40,
    chat: bool = False,
) -> list[str]:
    """Continue each prompt greedily, in evaluation mode; returns only the continuations.

    Prompts of different lengths are padded on the left, as a decoder-only model needs, regardless
    of the tokenizer's padding side.

    Args:
        model: any causal LM, dense or recovered; it is not changed.
        tokenizer: its tokenizer; it is not changed.
        prompts: a text, or several. With ``chat`` each may also be a list of messages, and a single
            list of messages is one prompt.
        max_new_tokens: largest number of generated tokens.
        chat: put each prompt into the tokenizer's chat template, as instruct models need; a text
            becomes a user message.

    Raises:
        ValueError: no prompt, or one without tokens; ``chat`` without a chat template, or messages
            without ``chat``; ``max_new_tokens`` below 1; a tokenizer that has nothing to pad with.
    """
    check_model(model)
    texts: Any = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("no prompt to continue: give at least one text")
    at_least(1, max_new_tokens=max_new_tokens)
    if chat:
        texts = _in_template(tokenizer, texts)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("prompts made of messages need chat=True; without it, give texts")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "this tokenizer has neither a padding nor an end token: set tokenizer.pad_token"
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,  # `generate` refuses them
        add_special_tokens=not chat,  # the template contains them
    )
    if not batch["attention_mask"].any(dim=1).all():
        raise ValueError("a prompt has no token: give a text that is not empty")
    generator: Any = model
    with torch.no_grad(), evaluating(model):
        out = generator.generate(
            **batch.to(input_device(model)),
            max_new_tokens=max_new_tokens,
            do_sample=False,  # these four override the checkpoint's generation config
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = out[:, batch["input_ids"].shape[1] :]
    decoded: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return decoded


def _in_template(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> list[str]:
    """Each prompt, a text or a list of messages, as the tokenizer's chat template writes it."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template: use chat=False, or set tokenizer.chat_template"
        )
    if isinstance(prompts[0], dict):
        prompts = [prompts]
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    texts: list[str] = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=False
    )
    return texts
