"""A model at work: load it by name, with or without an adapter, and let it answer."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import batch_generate, generate_step, generation_stream, stream_generate
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.storage import load_adapter
from ..adapters.tensor_parallel import shard_model
from ..data.eval_prompts import EvalPrompt
from ..data.limits import check_prompt, limits_of
from ..data.tokenize import encode_prompt
from ..models.loading import load_folder
from ..models.prompt_format import PROMPT_FORMAT, PromptFormat, format_of
from ..models.registry import find_model


def load(
    name: str, adapter_path: str | Path | None = None, *, group: mx.distributed.Group | None = None
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer by name.

    Args:
        name: A short name (``gemma-3``), a hub id (``org/name``), a local folder, or a ``.gguf``
            file.
        adapter_path: Folder of an adapter to put on it.
        group: Divide its blocks among these processes (``parallel="tensor"``), each of which calls
            this.

    Raises:
        ModelError: No such model, or it can't be read or divided; the message names the nearest
            ones.
        AdapterError: The adapter can't be read or belongs to another model.

    Example:
        >>> model, tokenizer = load("gemma-3")
    """
    source = find_model(name)
    if source.note:
        print(source.note, file=sys.stderr)
    prepare = None if group is None or group.size() == 1 else partial(shard_model, group=group)
    model, tokenizer, config = load_folder(source.path, prepare)
    model.prompt_format = PromptFormat.read(config.get(PROMPT_FORMAT))
    if adapter_path is not None:
        load_adapter(model, adapter_path)
    model.eval()
    model.loaded_as = name  # what a run of finetune is said to be of
    return model, tokenizer


def complete(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    chat: bool = True,
) -> str:
    """Answer one prompt, encoded as a training row's prompt is.

    Args:
        model: From ``load``, before or after ``finetune``.
        tokenizer: From ``load``.
        prompt: The text to go on from, or the user's turn where the tokenizer has a chat template.
        max_tokens: Most tokens to generate.
        temperature: 0 takes the likeliest token each time.
        chat: False leaves the chat template out.
    """
    pieces = stream(
        model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, chat=chat
    )
    return "".join(pieces)


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    chat: bool = True,
    earlier: Sequence[dict[str, str]] = (),
) -> Iterator[str]:
    """Yield the answer of ``complete`` piece by piece; a chat template puts ``earlier`` messages before the prompt."""
    model.eval()
    tokens = encode_prompt(prompt, tokenizer, chat=chat, earlier=earlier, form=format_of(model))
    max_tokens = check_prompt(
        limits_of(model), tokens, max_tokens, tokenizer, partial(print, file=sys.stderr)
    )
    sampler = make_sampler(temp=temperature)
    for response in stream_generate(
        model, tokenizer, tokens, max_tokens=max_tokens, sampler=sampler
    ):
        yield response.text


def answer_all(
    model: nn.Module, tokenizer: TokenizerWrapper, prompts: Sequence[list[int]], *, max_tokens: int
) -> list[str]:
    """Go on greedily from many prompts in token ids: in batches, or one by one where the model's caches can't join."""
    model.eval()
    limits = limits_of(model)
    max_tokens = min(check_prompt(limits, tokens, max_tokens, tokenizer) for tokens in prompts)
    if not all(map(_can_batch, make_prompt_cache(model))):
        return [_answer_one(model, tokenizer, prompt, max_tokens) for prompt in prompts]

    texts = batch_generate(
        model,
        tokenizer,
        list(prompts),
        max_tokens=max_tokens,
        sampler=lambda x: mx.argmax(x, axis=-1),
    ).texts
    # It has begun a token that nobody wants; its sums over processes must not meet those of what
    # comes next.
    mx.synchronize(generation_stream)
    return texts


def _can_batch(cache: Any) -> bool:
    """Tell whether caches of this kind, and all that it holds, can be merged into that of a batch."""
    if isinstance(cache, CacheList):
        return all(map(_can_batch, cache.caches))
    return hasattr(cache, "merge")


def _answer_one(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: Sequence[int], max_tokens: int
) -> str:
    """Go on greedily from one prompt, and decode it as ``batch_generate`` does."""
    tokens: list[int] = []
    for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens):
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(int(token))
    mx.synchronize(generation_stream)
    return tokenizer.decode(tokens)


def answer_questions(
    model: nn.Module, tokenizer: TokenizerWrapper, eval_prompts: Sequence[EvalPrompt]
) -> list[str]:
    """Answer questions greedily, each by a few tokens more than the longest wanted answer has."""
    if not eval_prompts:
        return []
    longest = max(question.length for question in eval_prompts)
    return answer_all(
        model, tokenizer, [question.tokens for question in eval_prompts], max_tokens=longest + 8
    )
