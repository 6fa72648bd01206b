"""The TensorRT library of this machine: ``tensorrt``, or ``tensorrt_rtx`` (TensorRT for RTX), which has the same API.

Both are imported when they are first needed, and keep quiet: what they say goes to `collect_messages`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

from bertrt.errors import BackendUnavailableError, InputError

TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt_rtx"
# Best first. Each with the extra that installs it, and with the first release that has nothing but strongly typed
# networks, which keep the types that the graphs say.
LIBRARIES: Final = (TENSORRT, TENSORRT_RTX)
_EXTRA: Final = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt-rtx"}
_LEAST: Final = {TENSORRT: (11, 0), TENSORRT_RTX: (1, 7)}
# Messages are kept for errors, which quote a few.
_MOST_MESSAGES: Final = 256
_LONGEST_MESSAGE: Final = 4096


def find_library(name: str | None = None) -> ModuleType:
    """Import a library by its name, or the best that is installed.

    One that is installed but does not work is an error; another instead would be a surprise.

    Args:
        name: one of `LIBRARIES`.

    Raises:
        InputError: there is no library of that name.
        BackendUnavailableError: it is not installed, does not load, or is too old.
    """
    if name is not None and name not in LIBRARIES:
        raise InputError(f"there is no TensorRT library {name!r}; choose {' or '.join(LIBRARIES)}")
    candidates = LIBRARIES if name is None else (name,)
    for candidate in candidates:
        if is_installed(candidate):
            return _load(candidate)
    missing = "neither tensorrt nor tensorrt_rtx is" if name is None else f"{name} is not"
    lines = ", or ".join(map(install_line, candidates))
    raise BackendUnavailableError(f"{missing} installed; {lines}")


def is_installed(name: str) -> bool:
    """Whether a library is there, without importing it."""
    return importlib.util.find_spec(name) is not None


def library_version(module: ModuleType) -> str:
    """The version of a library, such as ``1.7.1.116``."""
    return str(module.__version__)


def capabilities_built_for(module: ModuleType) -> tuple[str, ...] | None:
    """The compute capabilities that a library builds plans for, rising; ``None``: that of the GPU where it builds."""
    if module.__name__ == TENSORRT:
        return None
    found = (re.fullmatch(r"SM(\d+)(\d)", name) for name in module.ComputeCapability.__members__)
    return tuple(f"{major}.{minor}" for major, minor in sorted((int(m[1]), int(m[2])) for m in found if m))


def library_problem(name: str | None = None) -> str | None:
    """Why there is no library (of that name) and what to do about it, or ``None`` if there is one."""
    try:
        find_library(name)
    except BackendUnavailableError as error:
        return str(error)
    return None


def describe_library(name: str | None = None) -> str:
    """Name and version of the library that `find_library` gives, such as ``tensorrt_rtx 1.7.1.116``.

    Raises:
        InputError, BackendUnavailableError: as `find_library`.
    """
    module = find_library(name)
    return f"{module.__name__} {library_version(module)}"


def _load(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
        version = library_version(module)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"{name} is installed but does not load ({error}); run: {install_line(name)} --force-reinstall"
        ) from error
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _LEAST[name]:
        least = ".".join(map(str, _LEAST[name]))
        raise BackendUnavailableError(
            f"{name} {version} is too old: it would choose types of its own; {least} or later is needed: "
            f"{install_line(name)} --upgrade"
        )
    return module


def install_line(name: str) -> str:
    """The command that installs a library."""
    return f'pip install "bertrt[{_EXTRA[name]}]"'


@dataclass(slots=True)
class Messages:
    """What a library said while `collect_messages` listened.

    Attributes:
        errors: in the order in which they came.
        warnings: likewise.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


_lock: Final = threading.Lock()
_loggers: Final[dict[str, Any]] = {}
# Whoever listens, with the thread that began to.
_listeners: Final[list[tuple[int, Messages]]] = []


def library_logger(module: ModuleType) -> Any:
    """The library's ``ILogger`` that keeps messages for `collect_messages` and prints nothing.

    There is one for each library: it keeps the first that it is given, in this process, and warns of every other.
    """
    with _lock:
        if module.__name__ not in _loggers:
            _loggers[module.__name__] = _make_logger(module)
        return _loggers[module.__name__]


@contextlib.contextmanager
def collect_messages() -> Iterator[Messages]:
    """Collect what the libraries say in the block: in this thread, and in threads of their own."""
    messages = Messages()
    with _lock:
        _listeners.append((threading.get_ident(), messages))
    try:
        yield messages
    finally:
        with _lock:
            # By identity: equal ones may belong to a block around this one.
            _listeners[:] = [other for other in _listeners if other[1] is not messages]


def _make_logger(module: ModuleType) -> Any:
    base: Any = module.ILogger
    warning = int(base.WARNING)

    class Logger(base):  # type: ignore[misc]  # known when the library is
        def __init__(self) -> None:
            # Not super(): the bindings want their own by name.
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= warning:
                _keep(text, is_error=int(severity) < warning)

    return Logger()


def _keep(text: str, *, is_error: bool) -> None:
    thread = threading.get_ident()
    with _lock:
        here = [messages for owner, messages in _listeners if owner == thread]
        for messages in here or [messages for _, messages in _listeners]:
            kept = messages.errors if is_error else messages.warnings
            if len(kept) < _MOST_MESSAGES:
                kept.append(text[:_LONGEST_MESSAGE])
