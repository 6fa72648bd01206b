"""A machine with GPUs that are not there: `fake_cuda` and `fake_tensorrt` in the place of the real ones."""

import importlib.machinery
import os
import sys
import traceback

import fake_cuda
import fake_plans
import fake_tensorrt
import numpy as np

from bertrt.backends.base import BatchOutput, TokenBatch
from bertrt.backends.tensorrt import library as trt_library

FIELDS = tuple(BatchOutput.__slots__)
# Float32 sums in another order, on values of some tens.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def install(monkeypatch, count=2):
    """GPUs, and both libraries."""
    gpu = fake_cuda.Gpu(count)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", gpu.driver_module)
    monkeypatch.setattr(trt_library, "_loggers", {})
    for name in fake_plans.VERSIONS:
        module = fake_tensorrt.make_library(gpu, name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return gpu


def forked(check):
    """Call a function in a process that is forked from this one; what it raises there is raised here as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        text = b""
        try:
            check()
        except BaseException:
            text = traceback.format_exc().encode()
        os.write(writing, text)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert not text, text


def make_batch(lengths, seed=0):
    """Random tokens of the demo checkpoint."""
    generator = np.random.default_rng(seed)
    tokens = sum(lengths)
    return TokenBatch(
        input_ids=generator.integers(5, 8000, tokens).astype(np.int32),
        token_type_ids=generator.integers(0, 2, tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def check_same(found, expected):
    """Two outputs have the same fields and the same values."""
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if name == "mlm_top_ids" and expected.mlm_logits is not None:
            # Ids may differ where two logits are equal to within the tolerance; the logits named do not.
            ours, theirs = (np.take_along_axis(expected.mlm_logits, ids, axis=1) for ids in (ours, theirs))
        if ours is not None and ours.dtype == np.float32:
            np.testing.assert_allclose(ours, theirs, **CLOSE)
