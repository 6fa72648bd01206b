"""Sessions on the CPU in the place of those on GPUs, for `DeviceSessionParts`, and what PyTorch answers.

What a GPU does wrong is said by a session that stands between the executor and the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

from bertrt.backends.base import BatchOutput, TokenBatch, Wanted
from bertrt.backends.buckets import BucketRunner, Buckets
from bertrt.backends.onnxruntime.bindings import SessionPlace
from bertrt.backends.onnxruntime.devices import DeviceSessionParts
from bertrt.backends.onnxruntime.providers import profiles_of
from bertrt.backends.onnxruntime.sessions import CPU_PROVIDER, load_graph
from bertrt.backends.padded import PaddedBackend
from bertrt.folder import EngineFolder

LENGTHS = [3, 40, 1, 512, 17, 41, 2, 16, 15, 128, 129]
NO_MEMORY = "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 939524096"
LOST = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream); "
STATES = Wanted(hidden_states=True)
NAMES = (
    "hidden_states",
    "pooled",
    "nsp_logits",
    "mlm_logits",
    "mlm_top_log_probs",
    "mlm_candidate_log_probs",
)


class Watched:
    """A session that notes each of its runs, and lets a test come between.

    Attributes:
        runs: the run's ``gpu_graph_id``, or ``None``.
        threads: which have run it.
        before: called before each run.
        failures: raised by the next runs, in order.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.runs: list[str | None] = []
        self.threads: set[threading.Thread] = set()
        self.before: Callable[[], None] = lambda: None
        self.failures: list[Exception] = []

    def io_binding(self) -> onnxruntime.IOBinding:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions) -> None:
        try:
            self.runs.append(options.get_run_config_entry("gpu_graph_id"))
        except RuntimeError:
            self.runs.append(None)
        self.threads.add(threading.current_thread())
        self.before()
        if self.failures:
            raise self.failures.pop(0)
        self._session.run_with_iobinding(binding, options)


class Workers:
    """Places on the CPU, and the sessions that were opened for them; ``opened`` sees each before it is used."""

    def __init__(
        self,
        folder: EngineFolder,
        count: int = 1,
        *,
        graphs: bool = False,
        opened: Callable[[str, Watched], None] = lambda part, session: None,
    ) -> None:
        self._opened = opened
        self.sessions: list[dict[str, Watched]] = [{} for _ in range(count)]
        self.places = [
            SessionPlace(open=self._opener(folder, sessions), device_type="cpu", graphs=graphs)
            for sessions in self.sessions
        ]
        self.buckets = Buckets(profiles_of(folder.manifest.architecture), rebuild="nothing")
        self.executor = DeviceSessionParts(
            self.places, self.buckets, folder.manifest.architecture, folder.manifest.heads
        )

    def _opener(self, folder: EngineFolder, sessions: dict[str, Watched]) -> Callable[[str], Any]:
        opened = self._opened

        def open_part(part: str) -> Watched:
            sessions[part] = Watched(load_graph(folder, part, 1, [(CPU_PROVIDER, {})]))
            opened(part, sessions[part])
            return sessions[part]

        return open_part

    def backend(self, folder: EngineFolder) -> PaddedBackend:
        sizes, heads = folder.manifest.architecture, folder.manifest.heads
        runner = BucketRunner(self.executor, sizes, self.buckets)
        return PaddedBackend("onnxruntime", runner, architecture=sizes, heads=heads, threads=1)


def make_backend(folder: EngineFolder, count: int = 1, **options: Any) -> tuple[PaddedBackend, Workers]:
    workers = Workers(folder, count, **options)
    return workers.backend(folder), workers


def sequence(batch: TokenBatch, index: int) -> TokenBatch:
    start, end = batch.offsets[index : index + 2]
    return TokenBatch(
        batch.input_ids[start:end], batch.token_type_ids[start:end], np.array([0, end - start], np.int64)
    )


def everything(positions: list[int]) -> Wanted:
    return Wanted(
        mlm_positions=np.array(positions, np.int64),
        mlm_logits=True,
        mlm_top_k=7,
        mlm_candidates=np.array([[position, 5, 8191] for position in positions], np.int64),
        hidden_states=True,
        pooled=True,
        nsp=True,
    )


def feeds(ids: int, shape: tuple[int, int] = (2, 16)) -> dict[str, Any]:
    whole = np.full(shape, ids, np.int32)
    return {"input_ids": whole, "attention_mask": whole * 0 + 1, "token_type_ids": whole * 0}


@torch.inference_mode()
def pytorch(
    model: transformers.BertForPreTraining, batch: TokenBatch, positions: list[int]
) -> dict[str, np.ndarray[Any, Any]]:
    """What the reference answers, sequence by sequence, without padding."""
    hidden, pooled = [], []
    for index in range(batch.num_sequences):
        one = sequence(batch, index)
        bert = model.bert(
            torch.from_numpy(one.input_ids).long()[None],
            token_type_ids=torch.from_numpy(one.token_type_ids).long()[None],
        )
        hidden.append(bert.last_hidden_state[0])
        pooled.append(bert.pooler_output[0])
    states = torch.cat(hidden)
    logits = model.cls.predictions(states[positions])
    log_probs = logits.log_softmax(-1)
    candidates = torch.tensor([[position, 5, 8191] for position in positions])
    found = {
        "hidden_states": states,
        "pooled": torch.stack(pooled),
        "nsp_logits": model.cls.seq_relationship(torch.stack(pooled)),
        "mlm_logits": logits,
        "mlm_top_log_probs": log_probs.topk(7).values,
        "mlm_candidate_log_probs": log_probs.gather(1, candidates),
        "log_probs": log_probs,
    }
    return {name: values.numpy() for name, values in found.items()}


# Half a unit in the last place: of a product's operands in float16 and bfloat16.
ROUNDING = {"fp16": 2**-11, "bf16": 2**-8}


def check(found: BatchOutput, expected: dict[str, np.ndarray[Any, Any]], precision: str = "fp32") -> None:
    """Compare all outputs.

    float32 sums in another order: 1e-4 on values of some tens, as for every backend. float16 rounds each operand of
    a product by up to 2^-11 of it, bfloat16 by 2^-8: 25 products lie one behind the other (4 and attention's 2 in each
    of 4 layers, and the decoder), and in the worst case their errors add up, relative to the largest value. 8 bits
    are not near in the worst case, but in the mean of squares: by a third, where another model is off by 1 or more.
    """
    assert found.mlm_top_ids is not None
    if precision in {"int8", "fp8"}:
        for name in NAMES:
            values = expected[name]
            error = np.sqrt(np.mean((getattr(found, name) - values) ** 2))
            assert error < 0.3 * max(np.sqrt(np.mean((values - values.mean(axis=0)) ** 2)), 0.1), name
        return
    for name in NAMES:
        largest = float(np.abs(expected[name]).max())
        tolerance = 25 * ROUNDING[precision] * largest if precision in ROUNDING else 1e-4 * max(largest, 1)
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=0, atol=tolerance, err_msg=name)
    # The ids may differ where two are equal to within the tolerance; the values named do not.
    named = np.take_along_axis(expected["log_probs"], found.mlm_top_ids, axis=1)
    largest = float(np.abs(expected["mlm_logits"]).max())
    tolerance = (50 * ROUNDING[precision] if precision in ROUNDING else 2e-4) * largest
    np.testing.assert_allclose(named, expected["mlm_top_log_probs"], rtol=0, atol=tolerance)
