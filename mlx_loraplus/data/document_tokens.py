"""Encode the text of a document, piece by piece, so that it may be larger than memory."""

from collections.abc import Iterable, Iterator

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .special_tokens import closing_eos, fast_tokenizer, leading_bos


def encode_document(
    pieces: Iterable[str], tokenizer: TokenizerWrapper
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield a document's token ids and which are supervised: BOS, each piece of the text, EOS.

    All tokens except BOS are supervised. A piece is encoded together with the last character of the
    previous piece, because some tokenizers treat the start of a text differently.
    """
    backend = fast_tokenizer(tokenizer)
    bos = leading_bos(tokenizer)
    yield bos, [False] * len(bos)

    before = ""
    ids: list[int] = []
    for piece in pieces:
        encoding = backend.encode(before + piece, add_special_tokens=False)
        offsets = encoding.offsets

        # Leave out the tokens of the previous character, except one that also covers the piece.
        seam = len(before)
        if before and any(start < seam < end for start, end in offsets):
            ids = backend.encode(piece, add_special_tokens=False).ids
        else:
            pairs = zip(encoding.ids, offsets, strict=True)
            ids = [token for token, (_, end) in pairs if end > seam]
        yield ids, [True] * len(ids)
        before = piece[-1]

    eos = closing_eos(ids, tokenizer)
    yield eos, [True] * len(eos)
