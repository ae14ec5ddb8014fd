"""A tokenizer as GGUF's metadata, the inverse of models/gguf_tokenizer.py.

SentencePiece BPE (Gemma, Llama 2) is stored as pieces with scores: a piece's score falls with the
rank of the first merge that makes it. Byte-level BPE (Llama 3, SmolLM2) is stored with its merges
and the name of its pre-tokenizer.
"""

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import ModelError
from .tokenizer import PRE_TOKENIZERS


def add_tokenizer(writer: GGUFWriter, tokenizer: TokenizerWrapper, size: int) -> None:
    """Add a byte-pair tokenizer and its chat template to a file's metadata, filled up to ``size`` ids, the embeddings'.

    Raises: ModelError where it is of another kind.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"its tokenizer is of the kind {model['type']}, which can't become GGUF here; allowed"
            " is BPE"
        )
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _vocabulary(backend, size, pieces=pieces)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _pre_tokenizer(backend))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(
            "Prepend" in json.dumps(backend["normalizer"]) or bool(backend["pre_tokenizer"])
        )
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    around = tokenizer.encode("a")
    writer.add_add_bos_token(ids["bos"] is not None and around[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and around[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _vocabulary(
    backend: dict[str, Any], size: int, *, pieces: bool
) -> tuple[list[str], list[TokenType]]:
    """Return the tokens in the order of their ids, and their types."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    added = {token["id"]: token for token in backend["added_tokens"]}
    known = {index: token for token, index in backend["model"]["vocab"].items()}
    for index, token in {
        **known,
        **{index: token["content"] for index, token in added.items()},
    }.items():
        if index >= size:
            raise ModelError(f"its tokenizer has the id {index}, its embeddings have {size} rows")
        tokens[index], types[index] = token, TokenType.NORMAL
        if index in added:
            types[index] = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[index] = TokenType.BYTE
        if pieces and token == backend["model"]["unk_token"]:
            types[index] = TokenType.UNKNOWN
    if pieces:  # llama.cpp looks for user-defined tokens in the text as it is
        there = set(tokens)
        for index, kind in enumerate(types):
            plain = tokens[index].replace("▁", " ")
            if kind == TokenType.USER_DEFINED and plain not in there:
                tokens[index] = plain
    return tokens, types


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    """Return llama.cpp's name of what splits a text before bytes are merged."""
    whole = backend["pre_tokenizer"] or {"pretokenizers": []}
    *before, last = whole.get("pretokenizers", [whole]) or [{"type": "nothing"}]
    for name, parts in PRE_TOKENIZERS.items():
        if last["type"] == "ByteLevel" and before == [
            json.loads(part.__getstate__()) for part in parts
        ]:
            return name
    raise ModelError(
        f"its tokenizer splits by {', '.join(part['type'] for part in (*before, last))}, which"
        " llama.cpp is not known here to have as it is set; allowed are those of Llama 3, SmolLM2"
        " and GPT-2"
    )
