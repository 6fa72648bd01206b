"""How many tokens a block of a mix of lengths has: whatever is fastest for the contestant."""

from __future__ import annotations

import time
from typing import Final

from bertrt_bench.cases import Question
from bertrt_bench.contestants.base import Run
from bertrt_bench.contestants.parts import Block, Forward, cut

# Tokens of a block, padding included. A GPU is busy with some thousands; more of them have more padding.
_ON_GPU: Final = (2_048, 4_096, 8_192, 16_384)
_ON_CPU: Final = (256, 1_024)
_TRIALS: Final = 2


def budgets(question: Question, *, on_gpu: bool) -> tuple[int, ...]:
    """Those that are tried; the first where all sequences have one length, which make one block."""
    tried = _ON_GPU if on_gpu else _ON_CPU
    return tried if question.case.lengths is not None else tried[:1]


def fastest_budget(question: Question, forward: Forward, *, on_gpu: bool) -> int:
    """The budget with which a contestant that computes padded blocks answers a question fastest."""

    def run_with(budget: int) -> Run:
        blocks = [Block.of(part) for part in cut(question, token_budget=budget)]
        return lambda: {str(number): forward(block) for number, block in enumerate(blocks)}

    return fastest({budget: run_with(budget) for budget in budgets(question, on_gpu=on_gpu)})


def fastest(runs: dict[int, Run]) -> int:
    """The key of the fastest run: of each the best of some, after one that warms up; nothing is run of one alone."""
    if len(runs) == 1:
        return next(iter(runs))
    seconds = dict.fromkeys(runs, float("inf"))
    # In turns, so that what changes on the machine meanwhile meets all.
    for trial in range(1 + _TRIALS):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if trial:
                seconds[key] = min(seconds[key], time.perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)
