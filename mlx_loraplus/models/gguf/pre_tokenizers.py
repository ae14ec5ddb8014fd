"""How byte-level tokenizers split a text before they merge bytes, under llama.cpp's names.

Source: llama.cpp's src/llama-vocab.cpp, which quotes the patterns of the original tokenizer.json.
"""

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased(suffix: str) -> str:
    """Return the pattern of words that are split where lower case changes to upper case."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}"
    second = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
    return f"{first}|{second}"


_LLAMA3 = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_WORDS_WITH_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS_WITHOUT_MARKS = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_QWEN35 = f"{_CONTRACTIONS}|{_WORDS_WITH_MARKS}|\\p{{N}}|{_SIGNS_WITHOUT_MARKS}|{_SPACES}"
_QWEN2 = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_SIGNS}|{_SPACES}"
_GPT4O = "|".join([_cased(f"{_CONTRACTIONS}?"), r"\p{N}{1,3}", _SIGNS_OR_SLASH, _SPACES])
_SEED = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1}}| ?[^\\s\\p{{L}}\\p{{N}}\\r\\n]+|{_SPACES}"
_TEKKEN = "|".join([_cased(""), r"\p{N}", _SIGNS_OR_SLASH, _SPACES])


@dataclass(frozen=True)
class ByteLevelKind:
    """One kind of byte-level tokenizer."""

    pattern: str | None = None  # by default that of GPT-2
    splits_digits: bool = False  # one digit at a time, before the pattern
    ignores_merges: bool = False  # a word that is a token is not split
    adds_bos: bool = False  # by default

    def steps(self) -> list[Any]:
        """Return the steps that split a text."""
        steps: list[Any] = []
        if self.splits_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        use_regex = self.pattern is None
        return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]


BYTE_LEVEL = {
    "smollm": ByteLevelKind(splits_digits=True),
    "gpt-2": ByteLevelKind(),
    "llama-bpe": ByteLevelKind(_LLAMA3, ignores_merges=True, adds_bos=True),
    "dbrx": ByteLevelKind(_LLAMA3),
    "qwen2": ByteLevelKind(_QWEN2),
    "qwen35": ByteLevelKind(_QWEN35),
    "gpt-4o": ByteLevelKind(_GPT4O),
    "tekken": ByteLevelKind(_TEKKEN, ignores_merges=True, adds_bos=True),
    "seed-coder": ByteLevelKind(_SEED),
}
"""llama.cpp's name of a pre-tokenizer → its kind."""

GEMMA4 = "gemma4"
"""llama.cpp's name of Gemma 4, of its kind of tokenizer, and of its pre-tokenizer."""

SYNONYMS = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "lfm2": "llama-bpe",
    "smaug-bpe": "dbrx",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "llama4": "gpt-4o",
    "chatglm-bpe": "dbrx",
    "glm4": "dbrx",
    "olmo": "gpt-2",
}
"""Another name of a pre-tokenizer in llama.cpp → its name in ``BYTE_LEVEL``."""


def byte_level_name(name: str) -> str:
    """Return the name in ``BYTE_LEVEL`` of a pre-tokenizer with another name, or the same name."""
    return SYNONYMS.get(name, name)


def recognize_byte_level(backend: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer of a tokenizer.json, or None if unknown."""
    whole = backend["pre_tokenizer"] or {}
    steps = [_settings(step) for step in whole.get("pretokenizers", [whole])]
    ignores_merges = bool(backend["model"].get("ignore_merges"))
    for name, kind in BYTE_LEVEL.items():
        known = [_settings(json.loads(step.__getstate__())) for step in kind.steps()]
        if steps == known and ignores_merges == kind.ignores_merges:
            return name
    return None


def _settings(step: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a step that change how it splits."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}
