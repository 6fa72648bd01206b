"""PyTorch in float32 through transformers: what most people run today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bertrt.errors import MeasurementError
from bertrt_bench.cases import TOP_K, Question, Task
from bertrt_bench.contestants.base import Answer, Run, Setup

# The class that users of transformers take for each task. Each computes what it always computes: the
# masked-LM head runs at every position, because this is how BertForMaskedLM answers a single mask.
_CLASSES: Mapping[Task, str] = {
    "features": "BertModel",
    "fill-mask": "BertForMaskedLM",
    "mlm-all": "BertForMaskedLM",
    "next-sentence": "BertForNextSentencePrediction",
}


# The fastest attention that transformers has on a CPU, and its default.
_ATTENTION = "sdpa"


class TorchContestant:
    """transformers' own classes on one checkpoint, each loaded when its task is first prepared."""

    def __init__(self, checkpoint: str) -> None:
        # Heavy, and in the worker process only.
        import torch
        import transformers

        self._torch: Any = torch
        self._transformers: Any = transformers
        self._checkpoint = checkpoint
        self._models: dict[str, Any] = {}
        self.versions: Mapping[str, str] = {
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        }
        self.details: Mapping[str, str] = {
            "instruction_set": str(torch.backends.cpu.get_cpu_capability()),
            "dtype": "float32",
            "attention": _ATTENTION,
        }

    def prepare(self, question: Question) -> Run:
        """Load the task's model and shape the ids; the timed part starts and ends with NumPy arrays."""
        torch, case = self._torch, question.case
        model = self._model(_CLASSES[case.task])
        shape = (case.batch, case.sequence)
        input_ids = question.tokens.input_ids.reshape(shape).astype(np.int64)
        token_type_ids = question.tokens.token_type_ids.reshape(shape).astype(np.int64)
        attention_mask = np.ones(shape, dtype=np.int64)
        rows, columns = np.divmod(question.masks, case.sequence)

        def forward() -> Any:
            return model(
                input_ids=torch.from_numpy(input_ids),
                token_type_ids=torch.from_numpy(token_type_ids),
                attention_mask=torch.from_numpy(attention_mask),
            )

        def features() -> Answer:
            with torch.inference_mode():
                states = forward().last_hidden_state.numpy()
            return {"hidden_states": states.reshape(case.tokens, -1)}

        def fill_mask() -> Answer:
            with torch.inference_mode():
                log_probs = forward().logits[rows, columns].log_softmax(dim=-1)
                best = log_probs.topk(TOP_K, dim=-1)
            return {
                "ids": best.indices.numpy(),
                "log_probs": best.values.numpy(),
                "all_log_probs": log_probs.numpy(),
            }

        def mlm_all() -> Answer:
            with torch.inference_mode():
                logits = forward().logits.numpy()
            return {"logits": logits.reshape(case.tokens, -1)}

        def next_sentence() -> Answer:
            with torch.inference_mode():
                return {"logits": forward().logits.numpy()}

        runs: dict[Task, Run] = {
            "features": features,
            "fill-mask": fill_mask,
            "mlm-all": mlm_all,
            "next-sentence": next_sentence,
        }
        return runs[case.task]

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
    return TorchContestant(setup.reference)
