"""PyTorch on a GPU: plain attention, ``scaled_dot_product_attention``, and ``torch.compile`` of the latter.

A run begins with token ids in NumPy arrays and ends when the answer, in float32, is the caller's own in host memory.
It comes back the fastest way that PyTorch has: widened on the GPU, into pinned memory from PyTorch's pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from bertrt.cli.console import human_bytes
from bertrt.errors import MeasurementError
from bertrt.manifest import Precision
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import Question, Task
from bertrt_bench.contestants.base import Run, Setup, check_threads
from bertrt_bench.contestants.parts import Block, Forward, best_tokens, padded_run, told_of
from bertrt_bench.gpu.budgets import fastest_budget
from bertrt_export.checkpoints import open_checkpoint

CUDA: Final = "cuda"
# Runs before anything is timed. The first of a compiled model compiles, the second warms up what its CUDA graph needs,
# the third records the graph (torch._inductor.cudagraph_trees).
_FIRST_RUNS: Final = 4


class TorchContestant:
    """PyTorch's own BERT on one device.

    Args:
        model: a `bertrt_bench.gpu.model.TorchBert`.
        tokenizer: of the checkpoint.
        setup: precision, and as its backend the device: ``cuda`` or ``cpu``.
        compiled: run through ``torch.compile(mode="max-autotune")``, compiled anew for each shape.
    """

    def __init__(self, model: Any, tokenizer: WordPieceTokenizer, setup: Setup, *, compiled: bool) -> None:
        import torch

        self._torch: Any = torch
        self._model = model
        self._tokenizer = tokenizer
        self._device = setup.backend or CUDA
        self._compiled = compiled
        self._encode: Callable[..., Any] = model
        self._next_sentence: Callable[..., Any] = model.next_sentence
        if compiled:
            options: dict[str, Any] = {"mode": "max-autotune", "dynamic": False, "fullgraph": True}
            self._encode = torch.compile(model, **options)
            self._next_sentence = torch.compile(model.next_sentence, **options)
        self.threads = int(torch.get_num_threads())
        self.versions: Mapping[str, str] = {"torch": str(torch.__version__)}
        self.details: dict[str, str] = {
            "device": self._device,
            "dtype": setup.precision,
            "attention": model.attention,
            "compiled": "max-autotune" if compiled else "no",
            "float32 products": str(torch.get_float32_matmul_precision()),
        }

    def prepare(self, question: Question) -> Run:
        """Warm up, or compile; of a mix choose the size of blocks that is fastest."""
        if self._compiled and question.case.lengths is not None:
            raise MeasurementError("compiled for fixed shapes: each block of a mix would be compiled anew")
        forward = self._forward(question.case.task)
        budget = fastest_budget(question, forward, on_gpu=self._device == CUDA)
        self.details.update(told_of(question, budget))
        run = padded_run(question, forward, token_budget=budget, rank=best_tokens, tokenizer=self._tokenizer)
        for _ in range(_FIRST_RUNS):
            run()
        if self._device == CUDA:
            most = self._torch.cuda.max_memory_allocated()
            self.details["most that its allocator gave out"] = human_bytes(most)
        return run

    def _forward(self, task: Task) -> Forward:
        torch, device = self._torch, self._device

        def forward(block: Block) -> npt.NDArray[Any]:
            with torch.inference_mode():
                if self._compiled:
                    # What the last run gave is no longer needed: its memory in the graph may be used again.
                    torch.compiler.cudagraph_mark_step_begin()
                ids, segments = (
                    torch.from_numpy(array).to(device) for array in (block.input_ids, block.token_type_ids)
                )
                # Without padding no mask, as transformers does it: the fastest kernels take none.
                present = None if block.real.all() else torch.from_numpy(block.real).to(device)
                states = self._encode(ids, segments, present)
                values = states if task == "features" else self._next_sentence(states[:, 0])
                return self._to_host(values)

        return forward

    def _to_host(self, values: Any) -> npt.NDArray[Any]:
        torch = self._torch
        wide = values.to(torch.float32)
        if self._device != CUDA:
            # A compiled model's output may be overwritten by its next run; the answer is the caller's.
            return wide.clone().numpy() if self._compiled else wide.numpy()  # type: ignore[no-any-return]  # PyTorch's types are skipped
        host = torch.empty(wide.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(wide, non_blocking=True)
        torch.cuda.synchronize()
        return host.numpy()  # type: ignore[no-any-return]  # as above


def open_eager(setup: Setup) -> TorchContestant:
    """The plain formula of attention."""
    return _open(setup, attention="eager", compiled=False)


def open_sdpa(setup: Setup) -> TorchContestant:
    """``scaled_dot_product_attention``."""
    return _open(setup, attention="sdpa", compiled=False)


def open_compiled(setup: Setup) -> TorchContestant:
    """``scaled_dot_product_attention``, compiled."""
    return _open(setup, attention="sdpa", compiled=True)


def _open(setup: Setup, *, attention: Any, compiled: bool) -> TorchContestant:
    import torch

    # It imports PyTorch.
    from bertrt_bench.gpu.model import load_model

    if setup.reference is None:
        raise MeasurementError("PyTorch needs the folder of a checkpoint")
    device = setup.backend or CUDA
    if device == CUDA and not torch.cuda.is_available():
        raise MeasurementError(
            f"PyTorch {torch.__version__} sees no GPU; install its build for the CUDA of this machine's driver"
        )
    torch.set_num_threads(setup.threads)
    check_threads("PyTorch", torch.get_num_threads(), setup.threads)
    dtypes: Mapping[Precision, Any] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    with open_checkpoint(Path(setup.reference)) as checkpoint:
        model = load_model(checkpoint, attention=attention, dtype=dtypes[setup.precision], device=device)
        return TorchContestant(model, checkpoint.tokenizer, setup, compiled=compiled)
