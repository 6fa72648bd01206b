"""PyTorch in float32 through transformers: what most people run today."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bertrt.errors import MeasurementError
from bertrt.tokenization import WordPieceTokenizer
from bertrt_bench.cases import TOP_K, Question, Task
from bertrt_bench.contestants.base import Answer, Run, Setup, check_threads
from bertrt_bench.contestants.parts import Block, fastest_budget, padded_run, told_of

# The class that users of transformers take for each task. Each computes what it always computes: the
# masked-LM head runs at every position, because this is how BertForMaskedLM answers a single mask.
_CLASSES: Mapping[Task, str] = {
    "features": "BertModel",
    "fill-mask": "BertForMaskedLM",
    "fill-mask-text": "BertForMaskedLM",
    "mlm-all": "BertForMaskedLM",
    "next-sentence": "BertForNextSentencePrediction",
}


# The fastest attention that transformers has on a CPU, and its default.
_ATTENTION = "sdpa"


class TorchContestant:
    """transformers' own classes on one checkpoint, each loaded when its task is first prepared."""

    def __init__(self, checkpoint: str, tokenizer: WordPieceTokenizer) -> None:
        # Heavy, and in the worker process only.
        import torch
        import transformers

        self._torch: Any = torch
        self._transformers: Any = transformers
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._models: dict[str, Any] = {}
        self.threads = int(torch.get_num_threads())
        self.versions: Mapping[str, str] = {
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        }
        self.details: dict[str, str] = {
            "instruction_set": str(torch.backends.cpu.get_cpu_capability()),
            "dtype": "float32",
            "attention": _ATTENTION,
        }

    def prepare(self, question: Question) -> Run:
        """Load the task's model; the timed part starts and ends with NumPy arrays."""
        torch, task = self._torch, question.case.task
        model = self._model(_CLASSES[task])

        def forward(block: Block) -> npt.NDArray[Any]:
            with torch.inference_mode():
                output = model(**{name: torch.from_numpy(ids) for name, ids in block.feeds().items()})
                values: npt.NDArray[Any] = (
                    output.last_hidden_state if task == "features" else output.logits
                ).numpy()
            return values

        def rank(logits: npt.NDArray[Any]) -> Answer:
            with torch.inference_mode():
                log_probs = torch.from_numpy(logits).log_softmax(dim=-1)
                best = log_probs.topk(TOP_K, dim=-1)
            return {
                "ids": best.indices.numpy(),
                "log_probs": best.values.numpy(),
                "all_log_probs": log_probs.numpy(),
            }

        budget = fastest_budget(question, forward)
        self.details.update(told_of(question, budget))
        return padded_run(question, forward, token_budget=budget, rank=rank, tokenizer=self._tokenizer)

    def _model(self, name: str) -> Any:
        if name not in self._models:
            # The pooler belongs to next-sentence prediction; features are measured without it.
            options = {"add_pooling_layer": False} if name == "BertModel" else {}
            model, report = getattr(self._transformers, name).from_pretrained(
                self._checkpoint,
                dtype=self._torch.float32,
                attn_implementation=_ATTENTION,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
            # transformers would fill what is missing with noise, and say so in a warning only.
            if report["missing_keys"]:
                raise MeasurementError(
                    f"the reference checkpoint has no {', '.join(sorted(report['missing_keys']))}, "
                    f"which {name} needs; name the checkpoint that the engine was made from"
                )
            self._models[name] = model.eval()
        return self._models[name]


def open_torch(setup: Setup) -> TorchContestant:
    """Set PyTorch's threads and make the contestant."""
    if setup.reference is None:
        raise MeasurementError("the torch contestant needs a reference checkpoint")
    import torch

    torch.set_num_threads(setup.threads)
    # One request at a time: a second pool could only take CPUs away from the first.
    torch.set_num_interop_threads(1)
    check_threads("PyTorch", torch.get_num_threads(), setup.threads)
    return TorchContestant(setup.reference, WordPieceTokenizer.from_folder(Path(setup.engine)))
