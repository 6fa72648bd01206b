"""Texts of an exact number of tokens, for the task that starts with a text."""

from __future__ import annotations

from typing import Final

import numpy as np

from bertrt.batching import pack
from bertrt.errors import InputError
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import Case, Question, shortest

# Words to draw from: enough that no text repeats one often.
_MOST_WORDS: Final = 512


def make_text_question(case: Case, tokenizer: WordPieceTokenizer, *, seed: int = 0) -> Question:
    """Draw the texts of a case: words that are one token each, and one mask.

    Raises:
        InputError: a sequence is too short for its special tokens and a mask, or the vocabulary has no words.
    """
    lengths = case.sizes
    if int(lengths.min()) < shortest(case.task):
        raise InputError(
            f"a sequence of {int(lengths.min())} tokens is too short for {case.task}: with its special tokens "
            f"it needs at least {shortest(case.task)}"
        )
    words = one_token_words(tokenizer)
    random = np.random.default_rng([seed, case.batch, case.sequence])
    texts = []
    for length in lengths.tolist():
        chosen = [words[index] for index in random.integers(len(words), size=length - 2)]
        chosen[random.integers(length - 2)] = tokenizer.mask_token
        texts.append(" ".join(chosen))
    encodings = [windows[0] for windows in tokenizer.encode(texts, max_length=case.sequence)]
    tokens = pack(encodings)
    if tokens.lengths.tolist() != lengths.tolist():
        raise InputError(
            f"cannot make a text for {case}: this tokenizer joins or splits words that stand beside others; "
            "measure the task fill-mask instead"
        )
    masks = np.flatnonzero(tokens.input_ids == tokenizer.mask_id)
    return Question(case=case, tokens=tokens, masks=masks, texts=tuple(texts))


def one_token_words(tokenizer: WordPieceTokenizer) -> list[str]:
    """Lower-case words that the tokenizer leaves whole, spread over its vocabulary.

    Raises:
        InputError: there are none.
    """
    tokens = (tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size))
    plain = [token for token in tokens if token.isascii() and token.isalpha() and token.islower()]
    if plain:
        spread = np.unique(np.linspace(0, len(plain) - 1, _MOST_WORDS).astype(int))
        plain = [plain[index] for index in spread]
    whole = [
        word
        for word, windows in zip(plain, tokenizer.encode(plain, max_length=16), strict=True)
        if windows[0].input_ids.shape[0] == shortest("fill-mask-text")
    ]
    if not whole:
        raise InputError(
            "the vocabulary has no lower-case word of one token to make a text of; "
            "measure the task fill-mask instead"
        )
    return whole
