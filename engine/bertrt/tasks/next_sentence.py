"""Next sentence: does text B follow text A?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from bertrt.arguments import check_choice
from bertrt.backends.base import Wanted
from bertrt.batching import pack
from bertrt.errors import InputError
from bertrt.tasks.context import TaskContext, computed

PairOverflow = Literal["error", "truncate"]


def next_sentence(
    context: TaskContext, a: Sequence[str], b: Sequence[str], *, overflow: PairOverflow = "error"
) -> list[float]:
    """Answer `Engine.next_sentence` for lists of texts."""
    context.require("nsp", "next_sentence")
    check_choice(overflow, name="overflow", choices=("error", "truncate"))
    if len(a) != len(b):
        raise InputError(
            f"a has {len(a)} texts and b has {len(b)}; each text of a needs the text of b that may follow it"
        )
    if not a:
        return []
    encodings = context.tokenizer.encode_pairs(a, b, max_length=context.max_length, overflow=overflow)
    probabilities = np.empty(len(encodings), np.float64)
    lengths = [encoded.input_ids.shape[0] for encoded in encodings]
    for indices in context.plan(lengths):
        batch = pack([encodings[index] for index in indices])
        wide = computed(context.backend.run(batch, Wanted(nsp=True)).nsp_logits).astype(np.float64)
        # Softmax, column 0 ("B follows A"), without overflow for logits of any size.
        probabilities[indices] = np.exp(wide[:, 0] - np.logaddexp(wide[:, 0], wide[:, 1]))
    return [float(probability) for probability in probabilities]
