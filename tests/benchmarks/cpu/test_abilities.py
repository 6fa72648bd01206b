"""What is found on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bertrt.backends.native import active_isa, instruction_sets
from bertrt.errors import InputError
from bertrt_bench.contestants import RIVALS, ContestantKind
from bertrt_bench.cpu import abilities as module
from bertrt_bench.cpu.abilities import look

pytest.importorskip("bertrt._native", reason="the native kernels are not built")


def kind(name: str) -> ContestantKind:
    return ContestantKind(name=name, description="", factory="", modules=(name,), install="pip install it")


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BERTRT_ISA", raising=False)
    found = look()
    assert list(found.sets) == instruction_sets()
    assert found.best == active_isa()
    assert found.isa_problem("portable") == ""
    assert found.isa_problem("abacus") == "there are no kernels for it"
    assert set(found.rivals) == set(RIVALS)
    # The tests need them all.
    assert set(found.rivals.values()) == {""}


def test_an_instruction_set_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTRT_ISA", "avx2")
    with pytest.raises(InputError, match="BERTRT_ISA is set, but a run takes every instruction set"):
        look()


def test_packages_that_are_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenabacus.py").write_text("raise OSError('libbeads.so is gone')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    kinds = {name: kind(name) for name in ("json", "noabacus", "brokenabacus")}
    monkeypatch.setattr(module, "RIVALS", kinds)
    monkeypatch.delenv("BERTRT_ISA", raising=False)
    assert look().rivals == {
        "json": "",
        "noabacus": "cannot measure 'noabacus': noabacus not installed; install with: pip install it",
        "brokenabacus": "brokenabacus do not load (OSError: libbeads.so is gone); "
        "install again with: pip install it",
    }
