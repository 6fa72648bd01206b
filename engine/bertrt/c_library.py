"""Where the C header and the shared library lie that come with the native kernels.

``cc app.c -I"$(python -c 'import bertrt; print(bertrt.get_include())')" ...`` compiles a program against them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bertrt.errors import BackendUnavailableError

HEADER: Final = "bertrt.h"
LIBRARY: Final = "libbertrt.so"


def get_include() -> str:
    """The folder that holds ``bertrt.h``, for a compiler's ``-I``.

    Raises:
        BackendUnavailableError: the native kernels are not built, or were installed without the header.
    """
    return _folder_of("include", HEADER)


def get_library_dir() -> str:
    """The folder that holds ``libbertrt.so``, for a linker's ``-L`` and ``-rpath``.

    Raises:
        BackendUnavailableError: the native kernels are not built, or were installed without the library.
    """
    return _folder_of("lib", LIBRARY)


def _folder_of(folder: str, name: str) -> str:
    # Imported here: it needs numpy, and `import bertrt` alone does not.
    from bertrt.backends.native import load_kernels

    # Beside the extension module, which an editable installation keeps apart from the sources.
    path = Path(load_kernels().__file__ or "").resolve().parent / folder
    if not (path / name).is_file():
        raise BackendUnavailableError(
            f"there is no {name} in {str(path)!r}, though the native kernels are built; install bertrt again"
        )
    return str(path)
