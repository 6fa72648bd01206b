"""How much arithmetic a case is."""

from __future__ import annotations

import numpy as np

from bertrt.architecture import BertArchitecture
from bertrt_bench.cases import Case


def encoder_operations(case: Case, architecture: BertArchitecture) -> int:
    """Operations of the encoder's products in one run, two for each multiply-add.

    The layers' weights with every token, and the scores and the weighted sums of the attention; embeddings,
    norms, activations and softmax, which are no products, count nothing.
    """
    hidden, wide = architecture.hidden_size, architecture.intermediate_size
    linear = case.tokens * (4 * hidden * hidden + 2 * hidden * wide)
    attention = 2 * hidden * int(np.square(case.sizes).sum())
    return 2 * architecture.num_hidden_layers * (linear + attention)
