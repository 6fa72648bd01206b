"""The count of operations against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bertrt.architecture import BertArchitecture
from bertrt_bench.cases import Case
from bertrt_bench.work import encoder_operations


@pytest.mark.parametrize(
    "case", [Case(task="features", batch=3, sequence=17), Case.mix("features", [5, 31, 8])]
)
def test_operations_are_those_that_pytorch_counts(small_bert, case: Case) -> None:
    model = small_bert(attn_implementation="eager").bert
    counted = 0
    for length in case.sizes.tolist():
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.encoder(torch.zeros(1, length, model.config.hidden_size))
        counted += counter.get_total_flops()
    architecture = BertArchitecture.from_config(model.config.to_dict())
    assert encoder_operations(case, architecture) == counted
