"""Write a tokenizer into the metadata of a GGUF file, the inverse of ``tokenizer.py``.

SentencePiece BPE (Gemma, Llama 2) is stored as pieces with scores. A piece has a higher score if
the first merge that creates it comes earlier. For Gemma 4, its merges are stored, too. Byte-level
BPE (Llama 3, SmolLM2) is stored with its merges and the name of its pre-tokenizer.
"""

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import ModelError, counted
from .pre_tokenizers import BYTE_LEVEL, GEMMA4, recognize_byte_level

_VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>',
}  # fmt: skip
"""Gemma 4's tokens that llama.cpp's chat parser needs to see, as in llama.cpp's converter."""


def add_tokenizer(writer: GGUFWriter, tokenizer: TokenizerWrapper, size: int) -> None:
    """Add a byte-pair tokenizer and its chat template to a file's metadata.

    Args:
        writer: The file.
        tokenizer: The tokenizer.
        size: Number of rows of the model's embeddings. Ids below this number that have no token get
            a placeholder.

    Raises:
        ModelError: The tokenizer is of another kind, or has more ids than the embeddings have rows.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"its tokenizer is of type {model['type']}, which can't be written to GGUF here;"
            " allowed is BPE"
        )

    # Choose the kinds of the tokenizer and of its pre-tokenizer.
    is_sentencepiece = bool(model.get("byte_fallback"))
    is_gemma4 = is_sentencepiece and writer.arch == GEMMA4
    if is_gemma4:
        kind, pre_tokenizer = GEMMA4, GEMMA4
    elif is_sentencepiece:
        kind, pre_tokenizer = "llama", "default"
    else:
        kind, pre_tokenizer = "gpt2", _pre_tokenizer(backend)

    # Add the vocabulary.
    tokens, types = _vocabulary(backend, size)
    if is_sentencepiece:
        _mark_bytes(tokens, types, model["unk_token"])
    if is_sentencepiece and not is_gemma4:
        _unmark_spaces(tokens, types)
    if is_gemma4:
        types = _with_visible(tokens, types)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)

    # Add the scores or the merges of its pieces.
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if is_sentencepiece:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends_space(backend))
    if is_gemma4 or not is_sentencepiece:
        writer.add_token_merges([" ".join(pair) for pair in merges])

    _add_special_tokens(writer, tokenizer)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _vocabulary(backend: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Return the tokens in the order of their ids, and their types."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size

    # An added token replaces the token of the model's vocabulary with the same id.
    content_of = {index: token for token, index in backend["model"]["vocab"].items()}
    type_of: dict[int, TokenType] = {}
    for added in backend["added_tokens"]:
        index = added["id"]
        content_of[index] = added["content"]
        type_of[index] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED

    for index, token in content_of.items():
        if index >= size:
            rows = counted(size, "row")
            raise ModelError(f"its tokenizer has the id {index}, its embeddings have {rows}")
        tokens[index] = token
        types[index] = type_of.get(index, TokenType.NORMAL)
    return tokens, types


def _mark_bytes(tokens: list[str], types: list[TokenType], unknown: str | None) -> None:
    """Mark the tokens for bytes and for unknown characters; ``types`` is changed in place."""
    for index, token in enumerate(tokens):
        if types[index] == TokenType.NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[index] = TokenType.BYTE
        if token == unknown:
            types[index] = TokenType.UNKNOWN


def _unmark_spaces(tokens: list[str], types: list[TokenType]) -> None:
    """Replace "▁" by spaces in user-defined tokens; ``tokens`` is changed in place.

    llama.cpp matches these tokens in the text before it replaces spaces by "▁".
    """
    known = set(tokens)
    for index, token_type in enumerate(types):
        with_spaces = tokens[index].replace("▁", " ")
        if token_type == TokenType.USER_DEFINED and with_spaces not in known:
            tokens[index] = with_spaces


def _with_visible(tokens: list[str], types: list[TokenType]) -> list[TokenType]:
    """Return the types, where Gemma 4's tokens of thoughts and tool calls are visible."""
    pairs = zip(tokens, types, strict=True)
    return [TokenType.USER_DEFINED if token in _VISIBLE else kind for token, kind in pairs]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return each token's score: minus the rank of the first merge that creates the token."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(backend: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer adds a space before the text."""
    whole = backend["pre_tokenizer"] or {}
    for step in whole.get("pretokenizers", [whole]):
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return "Prepend" in json.dumps(backend["normalizer"])


def _add_special_tokens(writer: GGUFWriter, tokenizer: TokenizerWrapper) -> None:
    """Add the ids of the special tokens, and which tokens are added around each text."""
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "unk", "pad"):
        ids[name] = getattr(tokenizer, f"{name}_token_id")
        if ids[name] is not None:
            getattr(writer, f"add_{name}_token_id")(ids[name])

    # The end of a turn, if it differs from the end of a text.
    ends = sorted(set(tokenizer.eos_token_ids) - {ids["eos"]})
    if ends:
        writer.add_eot_token_id(ends[0])

    encoded = tokenizer.encode("a")
    writer.add_add_bos_token(ids["bos"] is not None and encoded[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and encoded[-1] == ids["eos"])


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer.

    Raises:
        ModelError: The pre-tokenizer is not supported.
    """
    name = recognize_byte_level(backend)
    if name is not None:
        return name

    whole = backend["pre_tokenizer"] or {"pretokenizers": []}
    steps = whole.get("pretokenizers", [whole]) or [{"type": "nothing"}]
    raise ModelError(
        f"its tokenizer splits by {', '.join(step['type'] for step in steps)}, which can't be"
        f" written to GGUF here with its settings; allowed are those of {', '.join(BYTE_LEVEL)}"
    )
