"""Eight threads on one engine give the answers that one thread gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from bertrt.engine import Engine

THREADS = 8
# The same batches are run, but a library may split its sums otherwise under load.
TOLERANCE = 1e-4


@pytest.fixture
def _one_thread_each() -> Iterator[None]:
    """Eight pools of spinning threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread_each")
def test_eight_threads(any_engine: Engine, prose: list[str]) -> None:
    engine = any_engine
    texts = [f"{line[:60]} [MASK] ." for line in prose[: 2 * THREADS]]
    shares = [texts[number::THREADS] for number in range(THREADS)]

    def answer(share: list[str]) -> tuple[Any, Any, Any, Any]:
        return (
            engine.fill_mask(share),
            engine.next_sentence(share, share[::-1]),
            engine.features(share, pooling="mean", overflow="window"),
            engine.score(share[0]),
        )

    expected = [answer(share) for share in shares]
    together = threading.Barrier(THREADS, timeout=60)

    def wait_and_answer(share: list[str]) -> tuple[Any, Any, Any, Any]:
        together.wait()
        return answer(share)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(wait_and_answer, shares))

    for one, other in zip(expected, found, strict=True):
        for rows, same in zip(one[0], other[0], strict=True):
            for row, again in zip(rows, same, strict=True):
                assert {**row, "score": None} == {**again, "score": None}
                assert row["score"] == pytest.approx(again["score"], abs=TOLERANCE)
        np.testing.assert_allclose(one[1], other[1], atol=TOLERANCE)
        np.testing.assert_allclose(one[2], other[2], atol=TOLERANCE)
        assert one[3].log_likelihood == pytest.approx(other[3].log_likelihood, abs=TOLERANCE * one[3].tokens)


def test_threads_may_close_at_once(make_engine: Any) -> None:
    engine = make_engine()
    with ThreadPoolExecutor(THREADS) as pool:
        for outcome in [pool.submit(engine.close) for _ in range(THREADS)]:
            outcome.result()
    assert repr(engine).endswith("closed)")
