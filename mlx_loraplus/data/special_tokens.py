"""The tokens that a tokenizer puts around a text (BOS and EOS), or in place of unknown text."""

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ModelError


def leading_bos(tokenizer: TokenizerWrapper) -> list[int]:
    """Return [BOS] if the tokenizer puts BOS before every text, else []."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer.encode("")[:1] == [bos]:
        return [bos]
    return []


def closing_eos(ids: Sequence[int], tokenizer: TokenizerWrapper) -> list[int]:
    """Return [EOS], or [] if ``ids`` already end with a token that ends generation."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "this model's tokenizer has no end-of-sequence token, so the model could not learn"
            " where to stop; use a model that has one"
        )
    if ids and ids[-1] in tokenizer.eos_token_ids:
        return []
    return [tokenizer.eos_token_id]


def has_unknown(ids: Sequence[int], text: str, tokenizer: TokenizerWrapper) -> bool:
    """Return whether a text has characters that became the token for unknown text."""
    unknown = tokenizer.unk_token_id

    # Tokenizers that have a token for every byte often use the end token's id here.
    if unknown is None or unknown in (tokenizer.bos_token_id, *tokenizer.eos_token_ids):
        return False
    return unknown in ids and str(tokenizer.unk_token) not in text
