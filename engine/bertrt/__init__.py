"""BertRT: optimised inference engines for BERT.

>>> from bertrt import Engine
>>> with Engine.load("demo") as engine:
...     engine.fill_mask("The ship sailed across the [MASK].", top_k=1)
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BatchOutput",
    "BertArchitecture",
    "BertRTError",
    "Encoded",
    "Engine",
    "Heads",
    "InputError",
    "Manifest",
    "MaskPrediction",
    "PseudoLikelihood",
    "TokenBatch",
    "Wanted",
    "WordPieceTokenizer",
    "__version__",
    "errors",
    "get_include",
    "get_library_dir",
]

if TYPE_CHECKING:
    from bertrt import errors
    from bertrt.architecture import BertArchitecture
    from bertrt.backends.base import Backend, BatchOutput, TokenBatch, Wanted
    from bertrt.c_library import get_include, get_library_dir
    from bertrt.engine import Engine
    from bertrt.errors import BertRTError, InputError
    from bertrt.manifest import Heads, Manifest
    from bertrt.tasks.fill_mask import MaskPrediction
    from bertrt.tasks.score import PseudoLikelihood
    from bertrt.tokenization import Encoded, WordPieceTokenizer
else:
    # A name is imported when it is first used: `import bertrt`, and a command that only prints its help, need
    # neither numpy nor tokenizers.
    _PLACES = {
        "Backend": "bertrt.backends.base",
        "BatchOutput": "bertrt.backends.base",
        "BertArchitecture": "bertrt.architecture",
        "BertRTError": "bertrt.errors",
        "Encoded": "bertrt.tokenization",
        "Engine": "bertrt.engine",
        "Heads": "bertrt.manifest",
        "InputError": "bertrt.errors",
        "Manifest": "bertrt.manifest",
        "MaskPrediction": "bertrt.tasks.fill_mask",
        "PseudoLikelihood": "bertrt.tasks.score",
        "TokenBatch": "bertrt.backends.base",
        "Wanted": "bertrt.backends.base",
        "WordPieceTokenizer": "bertrt.tokenization",
        "get_include": "bertrt.c_library",
        "get_library_dir": "bertrt.c_library",
    }

    def __getattr__(name):
        if name == "errors":
            return import_module("bertrt.errors")
        if name not in _PLACES:
            raise AttributeError(f"module 'bertrt' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_PLACES[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
