"""The builder's timing cache: how fast each kernel was on this GPU, so that the next build need not try them again.

TensorRT for RTX has none. It measures nothing when it builds; its functions for timing caches are there, do nothing
and ask for a GPU (https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/, "Timing Cache Migration").
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Final

from bertrt.backends.tensorrt.library import TENSORRT, collect_messages
from bertrt.errors import InputError, PlanBuildError
from bertrt.folder import write_file
from bertrt_export.plans.complaints import describe_messages

# Those of large models have a few megabytes; another file is not read into memory.
_LARGEST: Final = 256 << 20


class TimingCache:
    """A timing cache in a file: read before the first part is built, passed from part to part, kept in the end.

    Args:
        path: the file, which need not exist.
        module: the library.

    Raises:
        InputError: the library has no timing caches, the file cannot be read or is too large, or cannot be written.
    """

    def __init__(self, path: Path, module: ModuleType) -> None:
        if module.__name__ != TENSORRT:
            raise InputError(
                f"{module.__name__} has no timing cache: it compiles kernels where the plan is loaded, and measures "
                "none when it builds; leave --timing-cache out"
            )
        self._path = path
        self._data = _read(path)
        self._grown = False

    def give(self, config: Any) -> None:
        """Let a builder configuration use the cache.

        Raises:
            InputError: the library does not take it: corrupt, or of another release or GPU.
        """
        with collect_messages() as messages:
            cache = config.create_timing_cache(self._data)
            taken = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
        said = messages.errors + messages.warnings
        # Of one that it cannot read the library makes an empty one, and only mentions it.
        doubts = [message for message in said if "timing cache" in message.lower()] if self._data else []
        if not taken or doubts:
            reason = " ".join((doubts or said)[:1]) or "it was made by another release or for another GPU"
            raise InputError(
                f"TensorRT does not take the timing cache {str(self._path)!r}: {reason}; name another file, or remove "
                "this one and have it made again"
            )

    def take(self, config: Any) -> None:
        """Take what a build has added.

        Raises:
            PlanBuildError: the library does not give it.
        """
        with collect_messages() as messages:
            cache = config.get_timing_cache()
            data = None if cache is None else cache.serialize()
        if data is None:
            raise PlanBuildError(f"TensorRT does not give its timing cache: {describe_messages(messages)}")
        self._data, self._grown = bytes(memoryview(data)), True

    def keep(self) -> None:
        """Write the file, whole or not at all, if a build has added anything.

        Raises:
            PlanBuildError: it cannot be written.
        """
        if not self._grown:
            return
        try:
            write_file(self._path, self._data)
        except OSError as error:
            raise PlanBuildError(
                f"a plan is built, but the timing cache {str(self._path)!r} cannot be written: "
                f"{error.strerror or error}; name a file that can"
            ) from error


def _read(path: Path) -> bytes:
    try:
        if not path.parent.is_dir():
            raise InputError(
                f"the timing cache {str(path)!r} cannot be kept: there is no folder {str(path.parent)!r}; make it first"
            )
        if not path.exists():
            return b""
        if not path.is_file():  # to open a pipe is to wait for ever
            raise InputError(f"the timing cache {str(path)!r} is not a file; name another")
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(
            f"cannot read the timing cache {str(path)!r}: {error.strerror or error}; name another file"
        ) from error
    if len(data) > _LARGEST:
        raise InputError(
            f"the timing cache {str(path)!r} is larger than {_LARGEST:,} bytes; name another file"
        )
    return data
