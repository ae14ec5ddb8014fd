"""Properties that hold for any text: what is supervised, and that a text in pieces has the tokens of the whole."""

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from mlx_loraplus.data.document_tokens import encode_document
from mlx_loraplus.data.readers import read_text
from mlx_loraplus.data.rows import Row
from tests.data.reading import encode_one, encode_rows

characters = st.characters(codec="utf-8", max_codepoint=0xFFFF)
texts = st.text(characters, min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=75, deadline=None)
@given(prompt=st.text(characters, max_size=40), completion=texts)
def test_any_completion_on_gemma(gemma, prompt, completion):
    record = Row("completion", {"prompt": prompt, "completion": completion}, 1)
    example = encode_one(record, gemma)
    joined = gemma.encode(prompt + completion, add_special_tokens=False)
    assert example.tokens.tolist() == [gemma.bos_token_id, *joined, gemma.eos_token_id]
    learned = np.flatnonzero(example.supervised)
    assert learned.tolist() == list(range(learned[0], len(example.tokens)))  # one run, up to EOS
    assert len(gemma.decode(example.tokens[1 : learned[0]])) <= len(
        prompt
    )  # only the prompt is unsupervised
    assert len(gemma.decode(example.tokens[1 : learned[0] + 1])) > len(
        prompt
    ) or "�" in gemma.decode(joined)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(texts, min_size=2, max_size=6))
def test_any_chat_on_smollm2(smollm2, contents):
    assume(
        all(smollm2.decode(smollm2.encode(content)) == content for content in contents)
    )  # it lacks some bytes
    messages = [
        {"role": "assistant" if turn % 2 else "user", "content": content}
        for turn, content in enumerate(contents)
    ]
    example = encode_one(Row("chat", {"messages": messages[: len(messages) // 2 * 2]}, 1), smollm2)
    assert example.tokens.tolist() == smollm2.apply_chat_template(
        messages[: len(messages) // 2 * 2]
    )
    assert not example.supervised[0]
    learned = np.flatnonzero(example.supervised)
    turns = np.split(example.tokens[learned], np.flatnonzero(np.diff(learned) > 1) + 1)
    for turn, content in zip(turns, contents[1::2], strict=True):
        text = smollm2.decode(turn)
        seam = (
            "\n" if content[0].isspace() and not text.startswith(content) else ""
        )  # one token with the header's end
        assert text == f"{seam}{content}<|im_end|>"


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_many_rows_are_encoded_like_single_rows(gemma, rows):
    records = [
        Row("completion", {"prompt": prompt, "completion": completion}, row)
        for row, (prompt, completion) in enumerate(rows)
    ]
    for record, encoded in zip(records, encode_rows(records, gemma), strict=True):
        alone = encode_one(record, gemma)
        assert encoded.examples[0].tokens.tolist() == alone.tokens.tolist()
        assert encoded.examples[0].supervised.tolist() == alone.supervised.tolist()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(
        st.sampled_from(
            ["a", "it's", "Wien", "12", "é", "日本", ".", " ", "  ", "\n", "\n\n", "\t"]
        ),
        max_size=60,
    ),
    piece=st.integers(16, 24),
)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(gemma, smollm2, tmp_path, words, piece):
    text = "".join(words)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    pieces = list(read_text(tmp_path / "a.txt", piece=piece))
    assert "".join(pieces) == text
    for tokenizer in (gemma, smollm2):
        got = [token for ids, _ in encode_document(pieces, tokenizer) for token in ids]
        bos = [tokenizer.bos_token_id] if tokenizer is gemma else []
        assert got == [
            *bos,
            *tokenizer.encode(text, add_special_tokens=False),
            tokenizer.eos_token_id,
        ]
        learned = [
            supervised for _, part in encode_document(pieces, tokenizer) for supervised in part
        ]
        assert learned == [False] * len(bos) + [True] * (len(got) - len(bos))


def test_a_tokenizer_that_adds_a_leading_space_adds_it_once():
    """Llama 2's tokenizer adds one to every text, and so would to each piece of a document."""
    vocabulary = {
        token: number for number, token in enumerate(["<s>", "</s>", "▁", "\n", *"abc", "▁a", "▁b"])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer = TokenizerWrapper(fast)
    for pieces in (["ab\n", "ca b"], ["ab", " ca", " b\n", "a"], ["a" * 20, "b" * 20]):
        got = [token for ids, _ in encode_document(pieces, tokenizer) for token in ids]
        assert got == [*tokenizer.encode("".join(pieces), add_special_tokens=False), 1]
        assert got != [
            token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)
        ] + [1]


def test_a_text_without_spaces_is_cut_and_stays_whole(smollm2, tmp_path):
    (tmp_path / "a.txt").write_text("Wienerschnitzel" * 20)
    pieces = list(read_text(tmp_path / "a.txt", piece=4))
    assert len(pieces) > 3
    got = [token for ids, _ in encode_document(pieces, smollm2) for token in ids]
    assert smollm2.decode(got) == "Wienerschnitzel" * 20 + "<|im_end|>"
