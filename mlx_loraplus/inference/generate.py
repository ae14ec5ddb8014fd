"""Load a model by name, with or without an adapter, and generate answers."""

import json
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import batch_generate, generate_step, generation_stream, stream_generate
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..adapters.storage import adapter_folder, load_adapter
from ..adapters.stored_files import check_is_adapter, is_adapter, is_model, model_for
from ..adapters.tensor_parallel import shard_model
from ..call_checks import MODEL_ALLOWED
from ..command_config import ChatConfig
from ..data.encode_prompt import encode_prompt
from ..data.eval_prompts import EvalPrompt
from ..data.model_limits import check_prompt, limits_of
from ..device import set_wired_limit
from ..errors import ConfigError, ModelError
from ..files import read_bounded
from ..models.activation_note import activation_note
from ..models.damaged_weights import describe_damage
from ..models.derived_weights import start_inference
from ..models.find_model import find_model
from ..models.ignored_window import ignored_window
from ..models.language_model import check_language_model
from ..models.loading import load_folder
from ..models.model_name_check import check_model_path
from ..models.prompt_format import PROMPT_FORMAT, PromptFormat, format_of
from ..models.rope_magnitude import positions_note
from ..models.save_model_folder import ModelOrigin
from ..settings import configure

# Number of tokens by which an answer may exceed the longest expected answer.
_EXTRA_TOKENS = 8
_CUT_MARK = "…"
_SETS_WIRED_LIMIT = "maybe_set_recommended_wired_limit"  # mlx-lm's function


def load(
    name: str | PathLike[str] | None,
    adapter_path: str | PathLike[str] | None = None,
    *,
    group: mx.distributed.Group | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer by name, or a run: its model with its adapter.

    Args:
        name: A short name (``gemma-3``), a hub id (``org/name``), a local folder, or a ``.gguf``
            file. The folder of a run or an adapter loads the model that it names, with the adapter
            attached. None: the model that ``adapter_path`` names.
        adapter_path: Folder of an adapter to attach.
        group: Processes that the model's blocks are divided among (``parallel="tensor"``). Each
            process must call this function.

    Raises:
        ModelError: The model does not exist, or can't be read or divided. If the name is unknown,
            the message suggests similar ones.
        AdapterError: The adapter can't be read or belongs to another model.

    Example:
        >>> model, tokenizer = load("gemma-3")
        >>> model, tokenizer = load("my_run")
    """
    if name is None and adapter_path is None:
        raise ModelError(f"load: name is None; {MODEL_ALLOWED}, or the folder of a run")
    if adapter_path is None and name is not None and is_adapter(name):
        name, adapter_path = None, name
    # A command takes a model in the place of an adapter; a run with adapter full is one.
    if adapter_path is not None and name is None and is_model(adapter_path):
        name, adapter_path = adapter_path, None
    if adapter_path is not None:
        check_is_adapter(adapter_folder(fspath(adapter_path)))
    name = model_for(None if name is None else fspath(name), adapter_path)
    check_model_path(name)
    source = find_model(name)
    if source.note:
        _print_once(source.note)

    # Divide the model before its weights are read.
    prepare = None
    if group is not None and group.size() > 1:
        prepare = partial(shard_model, group=group)
    model, tokenizer, config = load_folder(source.path, prepare)

    # Record where mlx-lm computes something that differs from the config.
    model.ignored_window = ignored_window(model, config)
    for note in (activation_note(model, config), positions_note(model, config)):
        if note:
            _print_once(f"note: {note}")

    # A fused model stores its prompt format in its config; an adapter has a separate one.
    model.prompt_format = PromptFormat.read(config.get(PROMPT_FORMAT))
    if adapter_path is not None:
        load_adapter(model, fspath(adapter_path))
    start_inference(model)

    # ``finetune`` and ``save_adapter`` record these names of the model, and adapter full saves the
    # model with its config.
    model.loaded_as = name
    model.exact_name = source.exact_name
    model.origin = ModelOrigin(source.path, config)
    return model, tokenizer


@cache
def _print_once(note: str) -> None:
    """Print a note about a model: once, however often it is loaded, and in the first process."""
    if os.environ.get("MLX_RANK", "0") == "0":
        print(note, file=sys.stderr)


def system_message(model: nn.Module, system: str | None) -> list[dict[str, str]]:
    """Return the first messages of a chat: a system message if ``system`` is given.

    If it is None, the list is empty, and the system prompt of the training rows is used. If the
    rows had different system prompts, none is used, and a note is printed.
    """
    if system is not None:
        return [{"role": "system", "content": system}]
    if format_of(model).mixed_systems:
        sys.stderr.write(
            "note: the training rows had different system prompts, so none is used: give one with"
            " --system\n"
        )
    return []


def read_tools(path: str | None, tokenizer: TokenizerWrapper, *, chat: bool) -> list[Any]:
    """Return the list of tools in a JSON file; an empty list for None.

    Raises:
        ConfigError: The file does not hold a list of tools, or no chat template is used.
    """
    if path is None:
        return []
    if not chat or not tokenizer.has_chat_template:
        reason = "--no-chat leaves the prompt as it is"
        if chat:
            reason = "the model has no chat template"
        raise ConfigError(f"--tools {path} can't reach the model: {reason}; leave out --tools")

    try:
        tools = json.loads(read_bounded(Path(path)))
    except OSError as problem:
        raise ConfigError(f"--tools {path} can't be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise ConfigError(
            f"--tools {path} can't be read as JSON: {problem!s:.200}; write one list of tools"
        ) from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(
            f"--tools {path} does not hold a list of tools; write it as in the rows: "
            '[{"type": "function", "function": {"name": …, "parameters": …}}]'
        )
    return tools


def complete(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    chat: bool = True,
    system: str | None = None,
) -> str:
    """Return the answer to one prompt, which is encoded like the prompt of a training row.

    Args:
        model: From ``load``, before or after ``finetune``.
        tokenizer: From ``load``.
        prompt: The user's message if the tokenizer has a chat template; otherwise the text to
            continue.
        max_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 always takes the most likely token.
        chat: Whether to use the chat template.
        system: The system prompt. None: that of the training rows if most share one. An empty text:
            no system prompt.

    Raises:
        ConfigError: ``max_tokens`` or ``temperature`` is out of range.
        DataError: The prompt is empty, or too long for the model.
        ModelError: The model computes NaN, or the same probability for every token; or it is no
            language model of mlx-lm.
    """
    limits = {"max_tokens": int(max_tokens), "temperature": float(temperature)}
    configure(ChatConfig, limits)
    pieces = stream(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        chat=chat,
        earlier=[] if system is None else [{"role": "system", "content": system}],
    )
    return "".join(pieces)


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    chat: bool = True,
    earlier: Sequence[dict[str, str]] = (),
) -> Iterator[str]:
    """Yield the answer of ``complete`` piece by piece.

    ``prompt`` may also be token ids from ``encode_prompt``; then ``chat`` and ``earlier`` are not
    used. ``earlier`` holds the messages before the prompt, as for ``encode_prompt``. The other
    arguments are those of ``complete``.
    """
    check_language_model(model)
    start_inference(model)

    # Check the prompt; a model with learned positions may have room for fewer tokens.
    if isinstance(prompt, str):
        form = format_of(model)
        tokens = encode_prompt(prompt, tokenizer, chat=chat, earlier=earlier, form=form)
    else:
        tokens = list(prompt)
    warn = partial(print, file=sys.stderr)
    max_tokens = check_prompt(limits_of(model), tokens, max_tokens, tokenizer, warn)

    sampler = make_sampler(temp=temperature)
    responses = stream_generate(model, tokenizer, tokens, max_tokens=max_tokens, sampler=sampler)
    with _own_wired_limit():
        for number, response in enumerate(responses):
            if number == 0:
                _check_probabilities(model, response.logprobs)
            yield response.text


def _check_probabilities(model: nn.Module, log_probs: mx.array) -> None:
    """Raise ``ModelError`` if probabilities are not numbers, or are the same for every token."""
    problem = ""
    if mx.isnan(log_probs).any().item():
        problem = "computes NaN instead of probabilities"
    elif log_probs.size > 1 and mx.all(log_probs == log_probs[..., :1]).item():
        problem = "gives every token the same probability"
    if problem:
        raise ModelError(f"this model {problem}: {describe_damage(model)}")


def answer_all(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int,
    cut_mark: str = "",
) -> list[str]:
    """Return the greedy answers to many prompts.

    The prompts are answered in batches if the model's caches can be merged, otherwise one by one.

    Args:
        model: From ``load``.
        tokenizer: From ``load``.
        prompts: The token ids of each prompt.
        max_tokens: Maximum number of tokens to generate for each prompt.
        cut_mark: Added to an answer that the model had not ended after ``max_tokens``.
    """
    start_inference(model)
    limits = limits_of(model)
    max_tokens = min(check_prompt(limits, tokens, max_tokens, tokenizer) for tokens in prompts)
    if not all(map(_can_batch, make_prompt_cache(model))):
        answers = [_answer_one(model, tokenizer, prompt, max_tokens) for prompt in prompts]
    else:
        answers = _answer_batch(model, tokenizer, prompts, max_tokens)

    texts: list[str] = []
    for tokens in answers:
        is_cut = len(tokens) == max_tokens
        texts.append(tokenizer.decode(tokens) + (cut_mark if is_cut else ""))
    return texts


def _answer_batch(
    model: nn.Module, tokenizer: TokenizerWrapper, prompts: Sequence[list[int]], max_tokens: int
) -> list[list[int]]:
    """Return the token ids of the greedy answers to prompts, without those that end them."""
    with _own_wired_limit():
        answers = batch_generate(
            model,
            tokenizer,
            list(prompts),
            max_tokens=max_tokens,
            return_token_ids=True,
            sampler=lambda logits: mx.argmax(logits, axis=-1),
        )
    # The generator has already started to compute a token that is not used. Wait for it, because
    # on several processes its collective operations must not mix with those of the next step.
    mx.synchronize(generation_stream)
    return answers.token_ids or []


@contextmanager
def _own_wired_limit() -> Generator[None]:
    """Inside the context, mlx-lm wires as much memory as a run does; see ``set_wired_limit``.

    Otherwise it would wire all that Metal recommends; it has no setting for this.
    """
    module: Any = sys.modules[batch_generate.__module__]
    original = getattr(module, _SETS_WIRED_LIMIT, None)
    if original in (None, set_wired_limit):  # another mlx-lm, or already inside the context
        yield
        return
    setattr(module, _SETS_WIRED_LIMIT, set_wired_limit)
    try:
        yield
    finally:
        setattr(module, _SETS_WIRED_LIMIT, original)


def _can_batch(cache: Any) -> bool:
    """Return whether a cache, and every cache inside it, can be merged into a batch cache."""
    if isinstance(cache, CacheList):
        return all(map(_can_batch, cache.caches))
    return hasattr(cache, "merge")


def _answer_one(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: Sequence[int], max_tokens: int
) -> list[int]:
    """Return the token ids of the greedy answer to one prompt, without the one that ends it."""
    tokens: list[int] = []
    for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens):
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(int(token))

    mx.synchronize(generation_stream)
    return tokens


def answer_questions(
    model: nn.Module, tokenizer: TokenizerWrapper, eval_prompts: Sequence[EvalPrompt]
) -> list[str]:
    """Return the greedy answers to evaluation prompts.

    An answer has at most ``answer_length`` tokens; one that was cut there ends with "…".
    """
    if not eval_prompts:
        return []
    prompts = [eval_prompt.tokens for eval_prompt in eval_prompts]
    length = answer_length(eval_prompts)
    return answer_all(model, tokenizer, prompts, max_tokens=length, cut_mark=_CUT_MARK)


def answer_length(eval_prompts: Sequence[EvalPrompt]) -> int:
    """Return the maximum number of tokens in an answer to evaluation prompts.

    It is a few more than in the longest expected answer.
    """
    longest = max((eval_prompt.length for eval_prompt in eval_prompts), default=0)
    return longest + _EXTRA_TOKENS
