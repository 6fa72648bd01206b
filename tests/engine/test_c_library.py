"""Where the header and the shared library are, for those who compile against them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

import bertrt
from bertrt.errors import BackendUnavailableError


@pytest.mark.parametrize(
    ("place", "folder", "name"),
    [(bertrt.get_include, "include", "bertrt.h"), (bertrt.get_library_dir, "lib", "libbertrt.so")],
)
def test_beside_the_kernels(
    place: object, folder: str, name: str, kernels: ModuleType, tmp_path: Path
) -> None:
    assert callable(place)
    with pytest.raises(BackendUnavailableError, match=f"there is no {name} in .*; install bertrt again"):
        place()
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).touch()
    assert place() == str(tmp_path / folder)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("place", [bertrt.get_include, bertrt.get_library_dir])
def test_without_kernels(place: object) -> None:
    assert callable(place)
    with pytest.raises(BackendUnavailableError, match="the native kernels are not built"):
        place()


def test_they_are_installed() -> None:
    pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    assert "extern" in (Path(bertrt.get_include()) / "bertrt.h").read_text(encoding="utf-8")
    # An ELF file.
    assert (Path(bertrt.get_library_dir()) / "libbertrt.so").read_bytes()[:4] == b"\x7fELF"
