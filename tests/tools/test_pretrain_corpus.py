"""The corpus of the demo model: documents, sentences, vocabulary and ids."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from tools.pretrain_demo.corpus import (
    SPECIAL_TOKENS,
    Corpus,
    hold_out,
    read_documents,
    sentences,
    tokenize,
    train_vocabulary,
)
from transformers import BertTokenizerFast

from bertrt.errors import BertRTError, InputError, TextEncodingError


def test_documents_are_paragraphs_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeff\n\nOne.\r\nTwo é.\r\n \r\n\r\nThree.".encode())
    assert read_documents(path) == [["One.", "Two é."], ["Three."]]


def test_sentences_end_before_a_capital_or_a_quote() -> None:
    text = 'He left. "Why?" she asked. \'No!\' It cost 3.50 at 5 p.m. today! (Really.) "Yes." End'
    assert list(sentences([text, "Another paragraph."])) == [
        "He left.",
        '"Why?" she asked.',
        "'No!'",
        "It cost 3.50 at 5 p.m. today!",
        '(Really.) "Yes."',
        "End",
        "Another paragraph.",
    ]


def test_the_vocabulary_is_the_same_each_time_and_leaves_no_character_out(
    books: Path, vocabulary: list[str]
) -> None:
    documents = read_documents(books)
    assert vocabulary[:5] == list(SPECIAL_TOKENS)
    assert len(set(vocabulary)) == len(vocabulary)
    assert all(train_vocabulary(documents, len(vocabulary)) == vocabulary for _ in range(3))
    assert vocabulary.index("[UNK]") not in tokenize(documents, vocabulary).tokens


def test_ids_are_those_of_transformers(books: Path, tmp_path: Path) -> None:
    awkward = "Zoë said: fox-plum 漢字. Then the Fox ate. \u0301 !!! The end. The old cow. Unknown: Ω.\n"
    text = f"{books.read_text(encoding='utf-8')}\n{awkward}"
    path = tmp_path / "corpus.txt"
    path.write_text(text, encoding="utf-8")
    documents = read_documents(path)
    vocabulary = train_vocabulary(documents, 100)
    vocabulary.remove("Ω")
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    reference = BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=False, strip_accents=False)
    whole = [" ".join(document) for document in documents]
    expected = [reference(text, add_special_tokens=False)["input_ids"] for text in whole]
    corpus = tokenize(documents, vocabulary)
    bounds = corpus.document_bounds
    found = [corpus.tokens[begin:end].tolist() for begin, end in itertools.pairwise(bounds)]
    assert found == expected
    assert reference.unk_token_id in found[-1]


def test_a_special_token_that_an_author_wrote_is_text(books: Path, vocabulary: list[str]) -> None:
    documents = [*read_documents(books), ["The fox [MASK] fox. The [SEP] cow. The dog. The cat."]]
    special = [vocabulary.index(token) for token in ("[MASK]", "[SEP]")]
    assert not np.isin(tokenize(documents, vocabulary).tokens, special).any()


def test_held_out_documents_are_apart_and_do_not_change(numbered: Corpus) -> None:
    training, held_out = hold_out(numbered)
    assert len(held_out) == 8
    assert len(training) == 4
    assert sorted([*training.tokens, *held_out.tokens]) == numbered.tokens.tolist()
    assert np.array_equal(hold_out(numbered)[1].tokens, held_out.tokens)
    # Each chosen document is whole.
    ends = set(numbered.document_bounds.tolist())
    for part in (training, held_out):
        firsts = part.tokens[part.document_bounds[:-1]]
        assert set(firsts.tolist()) <= ends
        assert np.array_equal(part.sentences[part.documents], part.document_bounds)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InputError, "No such file"),
        (b"", InputError, "empty"),
        (b"\n \n\t\n", InputError, "empty"),
        (b"One.\nTwo.\n\xff\xfe.\n", TextEncodingError, "line 3, byte 10"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused(
    tmp_path: Path, content: bytes | None, error: type[BertRTError], message: str
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_documents(path)


def test_a_corpus_that_is_too_small_is_refused(books: Path, vocabulary: list[str]) -> None:
    documents = read_documents(books)[:15]
    with pytest.raises(InputError, match=r"15 documents .* at least 16"):
        tokenize([*documents, ["Only one. And two. And three"]], vocabulary)
    with pytest.raises(InputError, match=r"yields only \d+ WordPieces where 8192"):
        train_vocabulary(documents, 8192)
    with pytest.raises(InputError, match=r"so many characters that it needs \d+ WordPieces where 20"):
        train_vocabulary(documents, 20)
