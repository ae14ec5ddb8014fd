"""Convert the tokenizer inside a GGUF file into tokenizer.json and tokenizer_config.json.

Three kinds are supported. SentencePiece BPE (Gemma, Llama 2) stores a score for each piece, and
the scores determine the merges. Gemma 4's and byte-level BPE (Llama 3, SmolLM2) store the merges
themselves.

Sources: the tokenizer section of the GGUF specification; llama.cpp's src/llama-vocab.cpp for the
names of the pre-tokenizers; sentencepiece's bpe_model.cc for the order of merges.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ...errors import ModelError, counted
from .pre_tokenizers import BYTE_LEVEL, GEMMA4, byte_level_name

_LONGEST = 1024
"""Maximum length of a token; the time to find its parts grows with the square of the length."""

_ENDS_OF_TURN = (
    "<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>",
    "<|return|>", "<|call|>",
)  # fmt: skip

_ROLES = ("bos", "eos", "unknown", "padding", "eot")


@dataclass(frozen=True)
class _SpecialTokens:
    """The token of each role, or None, and which tokens are added around each text."""

    role: dict[str, str | None]
    add_bos: bool
    add_eos: bool


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json, and return the token ids for config.json.

    Raises:
        ModelError: The tokenizer is broken, or of a kind that can't be converted.
        Exception: The tokenizers library found an error in the tokenizer.
    """
    tokens, types = _vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        tokens = _with_marks(tokens, types)
        tokenizer = _sentencepiece(metadata, tokens, _merges_by_score(metadata, tokens, types))
    elif kind == GEMMA4:
        tokenizer = _sentencepiece(metadata, tokens, _stored_merges(metadata))
    elif kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    else:
        raise ModelError(
            f"its tokenizer is of type {kind!r:.40}; allowed are 'llama', 'gpt2' and 'gemma4'"
        )

    # Add the tokens that are matched whole, and the tokens around each text.
    control = _tokens_of_type(tokens, types, TokenType.CONTROL)
    _add_tokens(tokenizer, control, is_special=True)
    defined = _tokens_of_type(tokens, types, TokenType.USER_DEFINED)
    _add_tokens(tokenizer, defined, is_special=False)
    special = _special_tokens(metadata, tokens)
    _surround_texts(tokenizer, special, tokens)

    # Write the two files.
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ModelError(
            f"its tokenizer.chat_template is {template!r:.40}; allowed is the text of a template"
        )
    config = _tokenizer_config(special, template)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))

    # A model with a chat template also stops at its end-of-turn token.
    ends = [special.role["eos"], special.role["eot"]]
    if template:
        ends += [token for token in _ENDS_OF_TURN if token in control]
    return _token_ids(special, ends, tokens)


def _vocabulary(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, in the order of their ids."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(
            "it holds no tokenizer (tokenizer.ggml.tokens is missing): use a file that holds one"
        )

    # If the file has no types, all tokens are normal tokens.
    types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(
            f"its tokenizer is broken: it has {counted(len(tokens), 'token')} and"
            f" {counted(len(types), 'token type')}"
        )
    if len(set(tokens)) != len(tokens):
        raise ModelError("its tokenizer is broken: a token appears twice")
    return tokens, [int(token_type) for token_type in types]


def _with_marks(tokens: list[str], types: list[int]) -> list[str]:
    """Return the tokens with SentencePiece's mark for spaces.

    In user-defined tokens, llama.cpp's converter replaces the mark with a space; this is undone
    here.
    """
    known = set(tokens)
    marked: list[str] = []
    for token, token_type in zip(tokens, types, strict=True):
        with_mark = token.replace(" ", "▁")
        is_changed = token_type == TokenType.USER_DEFINED and with_mark not in known
        marked.append(with_mark if is_changed else token)
    return marked


def _tokens_of_type(tokens: list[str], types: list[int], wanted: int) -> list[str]:
    """Return the tokens of one type, without empty tokens."""
    pairs = zip(tokens, types, strict=True)
    return [token for token, token_type in pairs if token and token_type == wanted]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], *, is_special: bool) -> None:
    """Add tokens that are matched in a text before it is split into pieces.

    Tokens that start with "▁" are matched after spaces were replaced by "▁". All other tokens are
    matched in the original text.
    """
    added = [AddedToken(token, normalized=token[0] == "▁", special=is_special) for token in tokens]
    tokenizer.add_tokens(added)


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> _SpecialTokens:
    """Return the special tokens, such as BOS and EOS."""
    is_sentencepiece = metadata.get("tokenizer.ggml.model") in ("llama", GEMMA4)
    kind = BYTE_LEVEL.get(_pre_tokenizer_name(metadata))
    adds_bos_by_default = is_sentencepiece or (kind is not None and kind.adds_bos)
    return _SpecialTokens(
        role={role: _token_of(role, metadata, tokens) for role in _ROLES},
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos_by_default)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )


def _token_of(role: str, metadata: dict[str, Any], tokens: list[str]) -> str | None:
    """Return the token with a role such as "bos", or None if no token has this role."""
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if index is None:
        return None
    is_id = isinstance(index, int) and not isinstance(index, bool)
    if not is_id or not 0 <= index < len(tokens):
        raise ModelError(f"its {role} token id is {index!r}; allowed are 0 to {len(tokens) - 1}")
    return tokens[index]


def _surround_texts(tokenizer: Tokenizer, special: _SpecialTokens, tokens: list[str]) -> None:
    """Make a tokenizer add BOS and EOS around each text, if the file requires it."""
    bos = special.role["bos"] if special.add_bos else None
    eos = special.role["eos"] if special.add_eos else None
    if bos is None and eos is None:
        return

    around = [token for token in (bos, eos) if token is not None]
    single = [part for part in (bos, "$A", eos) if part is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1"],
        special_tokens=[(token, tokens.index(token)) for token in around],
    )


def _tokenizer_config(special: _SpecialTokens, template: Any) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.role["bos"],
        "eos_token": special.role["eos"],
        "unk_token": special.role["unknown"],
        "pad_token": special.role["padding"],
        "add_bos_token": special.add_bos,
        "add_eos_token": special.add_eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    return {key: value for key, value in config.items() if value is not None}


def _token_ids(
    special: _SpecialTokens, ends: list[str | None], tokens: list[str]
) -> dict[str, Any]:
    """Return the token ids for config.json."""
    bos, padding = special.role["bos"], special.role["padding"]
    ids: dict[str, Any] = {}
    if bos:
        ids["bos_token_id"] = tokens.index(bos)
    end_ids = [tokens.index(token) for token in dict.fromkeys(ends) if token]
    if end_ids:
        ids["eos_token_id"] = end_ids
    if padding:
        ids["pad_token_id"] = tokens.index(padding)
    return ids


def _merges_by_score(
    metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> list[tuple[str, str]]:
    """Return the merges that follow from the scores of a SentencePiece BPE.

    In each step, two neighbouring pieces are merged: the pair that gives the piece with the highest
    score.
    """
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise ModelError(
            f"its tokenizer is broken: it has {counted(len(tokens), 'token')} and"
            f" {counted(len(scores), 'score')}"
        )
    # Special tokens have no merges.
    score_of: dict[str, float] = {}
    for token, score, token_type in zip(tokens, scores, types, strict=True):
        if token_type == TokenType.NORMAL:
            score_of[token] = float(score)
    if not all(map(math.isfinite, score_of.values())):
        raise ModelError("its tokenizer is broken: a score of a token is not a finite number")
    if any(len(token) > _LONGEST for token in score_of):
        raise ModelError(f"its tokenizer is broken: a token has more than {_LONGEST:,} characters")
    return _merges(score_of, {token: index for index, token in enumerate(tokens)})


def _stored_merges(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges that a file stores."""
    stored = metadata.get("tokenizer.ggml.merges")
    if not isinstance(stored, list):
        raise ModelError("its tokenizer is broken: tokenizer.ggml.merges is missing")
    pairs: list[tuple[str, str]] = []
    for merge in stored:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    return pairs


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], merges: list[tuple[str, str]]
) -> Tokenizer:
    """Build a SentencePiece BPE from its merges."""
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = _token_of("unknown", metadata, tokens)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )

    # Replace spaces by the mark. Most tokenizers also put a mark before the text.
    mark_spaces = normalizers.Replace(" ", "▁")
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), mark_spaces])
        tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = mark_spaces
        tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merges(score_of: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that gives a piece, sorted by highest score, then lowest ids."""
    merges: list[tuple[str, str]] = []
    for piece in score_of:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score_of and right in score_of:
                merges.append((left, right))
    merges.sort(key=lambda pair: (-score_of[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    return merges


def _pre_tokenizer_name(metadata: dict[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer; synonyms give the same name."""
    return byte_level_name(str(metadata.get("tokenizer.ggml.pre", "default")))


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Build a byte-level BPE from its stored merges."""
    merges = _stored_merges(metadata)
    name = _pre_tokenizer_name(metadata)
    if name not in BYTE_LEVEL:
        raise ModelError(f"its pre-tokenizer is {name!r:.40}; allowed are {', '.join(BYTE_LEVEL)}")

    kind = BYTE_LEVEL[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind.ignores_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(kind.steps())
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
