"""The tokenizer inside a GGUF file, as the tokenizer.json and tokenizer_config.json of a hub folder.

Two kinds: SentencePiece BPE (Gemma, Llama 2), whose merges follow from the pieces' scores, and
byte-level BPE (Llama 3, SmolLM2), whose merges are stored. Sources: the GGUF specification's
tokenizer section; llama.cpp's src/llama-vocab.cpp for the names of the pre-tokenizers;
sentencepiece's bpe_model.cc for the order of merges.
"""

import json
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ...errors import ModelError

_LONGEST = 1024
_ENDS_OF_TURN = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": [],
    "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated")],
}
"""llama.cpp's name of what splits a text before its bytes are merged: what stands before ByteLevel."""


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json, and return the token ids that belong in config.json.

    Raises: ModelError when its tokenizer is of a kind that can't be converted; for a broken one it,
        or anything that tokenizers raises.
    """
    tokens, types = _vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        tokens = _with_marks(tokens, types)
        tokenizer = _sentencepiece(metadata, tokens, types)
    elif kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    else:
        raise ModelError(
            f"its tokenizer is of the kind {kind!r:.40}; allowed are 'llama' and 'gpt2'"
        )
    control, defined = (
        [token for token, kind in zip(tokens, types, strict=True) if kind == wanted and token]
        for wanted in (TokenType.CONTROL, TokenType.USER_DEFINED)
    )
    for special, content in ((True, control), (False, defined)):
        # a run of spaces is matched after spaces became "▁", everything else in the text as it is
        tokenizer.add_tokens(
            [AddedToken(token, normalized=token[0] == "▁", special=special) for token in content]
        )

    named = {
        role: _special(metadata, tokens, role)
        for role in ("bos", "eos", "unknown", "padding", "eot")
    }
    add_bos = bool(
        metadata.get(
            "tokenizer.ggml.add_bos_token", kind == "llama" or _split(metadata) == "llama-bpe"
        )
    )
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    around = [named["bos"] if add_bos else None, "$A", named["eos"] if add_eos else None]
    single = [part for part in around if part is not None]
    if len(single) > 1:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, "$B:1"],
            special_tokens=[(t, tokens.index(t)) for t in single if t in tokens],
        )

    template = metadata.get("tokenizer.chat_template")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "unk_token": named["unknown"],
        "pad_token": named["padding"],
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))

    ends = [named["eos"], named["eot"]]
    if template:  # a model that answers in turns also stops at the end of its turn
        ends += [token for token in _ENDS_OF_TURN if token in control]
    ids = {
        "bos_token_id": named["bos"] and tokens.index(named["bos"]),
        "eos_token_id": [tokens.index(token) for token in dict.fromkeys(ends) if token],
        "pad_token_id": named["padding"] and tokens.index(named["padding"]),
    }
    return {key: value for key, value in ids.items() if value not in (None, [])}


def _vocabulary(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, in the order of their ids."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(
            "it holds no tokenizer (tokenizer.ggml.tokens is missing); use a complete one"
        )
    types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(
            f"its tokenizer is broken: {len(tokens)} tokens but not as many token types"
        )
    if len(set(tokens)) != len(tokens):
        raise ModelError("its tokenizer is broken: a token is there twice")
    return tokens, [int(token_type) for token_type in types]


def _with_marks(tokens: list[str], types: list[int]) -> list[str]:
    """Return the tokens with SentencePiece's mark for spaces; llama.cpp's converter drops it in user-defined ones."""
    known, marked = set(tokens), [token.replace(" ", "▁") for token in tokens]
    rows = zip(tokens, marked, types, strict=True)
    return [
        new if kind == TokenType.USER_DEFINED and new not in known else old
        for old, new, kind in rows
    ]


def _special(metadata: dict[str, Any], tokens: list[str], role: str) -> str | None:
    """Return the token that plays a role (bos, eos, ...), or None if none does."""
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ModelError(f"its {role} token id is {index!r}; allowed are 0 to {len(tokens) - 1}")
    return tokens[index]


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """Build a SentencePiece BPE: merge whichever neighbours make the piece with the highest score."""
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise ModelError(f"its tokenizer is broken: {len(tokens)} tokens but not as many scores")
    rows = zip(tokens, scores, types, strict=True)
    score = {
        token: float(value) for token, value, token_type in rows if token_type == TokenType.NORMAL
    }
    if any(
        len(token) > _LONGEST for token in score
    ):  # looking for its parts takes the square of its length
        raise ModelError(f"its tokenizer is broken: a token has more than {_LONGEST:,} characters")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    merges.sort(key=lambda pair: (-score[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    unknown = _special(metadata, tokens, "unknown")
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        tokenizer.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(plain)
    return tokenizer


def _split(metadata: dict[str, Any]) -> str:
    """Return the pre-tokenizer's name, one for its synonyms."""
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    return {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}.get(name, name)


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Build a byte-level BPE from its stored merges."""
    stored = metadata.get("tokenizer.ggml.merges")
    if not isinstance(stored, list):
        raise ModelError("its tokenizer is broken: tokenizer.ggml.merges is missing")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in stored]
    split = _split(metadata)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "llama-bpe")
    if split not in PRE_TOKENIZERS:
        raise ModelError(
            f"its pre-tokenizer is {split!r:.40}; allowed are {', '.join(PRE_TOKENIZERS)}"
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*PRE_TOKENIZERS[split], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
