"""A small text, easy to learn, and what is made of it.

The tools are no part of the installed distribution: they are found from the root of the repository.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.pretrain_demo.corpus import Corpus, hold_out, read_documents, tokenize, train_vocabulary
from tools.pretrain_demo.examples import ExampleSource
from tools.pretrain_demo.model import ModelShape

# Each of these words is always followed by the next one of its row.
_ROWS = ("red fox sees plum", "old cow eats corn", "wet cat hits wool", "big dog digs bone")
# All that this text yields: every word is a WordPiece.
_VOCABULARY = 87


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 documents that keep to one row each, in sentences of its words."""
    rng = np.random.default_rng(0)
    text = []
    for number in range(24):
        words = _ROWS[number % len(_ROWS)]
        paragraphs = [" ".join(f"The {words}." for _ in range(rng.integers(1, 6))) for _ in range(8)]
        text.append("\n".join(paragraphs))
    path = tmp_path_factory.mktemp("corpus") / "books.txt"
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocabulary(books: Path) -> list[str]:
    return train_vocabulary(read_documents(books), _VOCABULARY)


@pytest.fixture(scope="session")
def shape() -> ModelShape:
    return ModelShape(layers=1, hidden=64, vocabulary=_VOCABULARY)


@pytest.fixture(scope="session")
def sources(books: Path, vocabulary: list[str]) -> tuple[ExampleSource, ExampleSource]:
    """Examples to learn from, and held-out ones."""
    training, held_out = hold_out(tokenize(read_documents(books), vocabulary))
    return ExampleSource(training, vocabulary), ExampleSource(held_out, vocabulary)


@pytest.fixture(scope="session")
def numbered() -> Corpus:
    """Twelve documents of sentences of 1 to 30 tokens, each token its own place in the corpus."""
    rng = np.random.default_rng(5)
    bounds = np.concatenate([[0], np.cumsum(rng.integers(1, 31, size=600))])
    return Corpus(
        tokens=np.arange(bounds[-1], dtype=np.int32),
        sentences=bounds.astype(np.int64),
        documents=np.array([0, 4, 8, 30, 60, 100, 150, 220, 300, 400, 500, 596, 600]),
    )
