"""Comparing builds of the kernels: what is built, and that a build is called rightly."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from tools.compare_kernels.__main__ import main
from tools.compare_kernels.comparison import compare
from tools.compare_kernels.library import Library, build
from tools.compare_kernels.variants import Variant, write_sources

import bertrt
from bertrt import Engine
from bertrt.backends.base import TokenBatch, Wanted
from bertrt.errors import BertRTError, InputError
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.exporter import export_engine

_SOURCES = {
    "kernels/src/plan.h": "inline constexpr int kRows = 256;  // rows\nconstexpr double kCost = 1.0 / 3;\n",
    "kernels/src/kernels/amx.h": "struct A {\n  static constexpr int kSteps = 16;\n};\n"
    "struct B {\n  static constexpr int kSteps = 12;\n};\nint f(int kRows = 3);\n",
    "pyproject.toml": 'version = "1"\n',
}


@pytest.fixture(scope="module")
def small_engine(
    small_bert: Callable[..., transformers.BertForPreTraining],
    save_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    out = tmp_path_factory.mktemp("engines") / "small"
    with open_checkpoint(str(save_checkpoint(small_bert()))) as checkpoint:
        export_engine(checkpoint, out, precision="int8", backends=("native",))
    return out


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name, text in _SOURCES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def _written(variant: str, repository: Path, tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "sources"
    write_sources(Variant.parse(variant), repository, folder)
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_a_revision_is_taken_from_git_and_the_working_tree_as_it_lies(
    repository: Path, tmp_path: Path
) -> None:
    changed = _SOURCES["kernels/src/plan.h"].replace("256", "384")
    (repository / "kernels/src/plan.h").write_text(changed, encoding="utf-8")
    assert _written("HEAD", repository, tmp_path) == _SOURCES
    assert _written(".", repository, tmp_path) == {**_SOURCES, "kernels/src/plan.h": changed}


def test_constants_are_set_where_they_are_defined(repository: Path, tmp_path: Path) -> None:
    found = _written(".:kRows=2*64,B::kSteps=8,kCost=0", repository, tmp_path)
    assert found["kernels/src/plan.h"] == (
        "inline constexpr int kRows = 2*64;  // rows\nconstexpr double kCost = 0;\n"
    )
    assert found["kernels/src/kernels/amx.h"] == _SOURCES["kernels/src/kernels/amx.h"].replace("12", "8")


@pytest.mark.parametrize("constant", ["kNone", "kSteps", "C::kSteps", "A::kRows", "k.*"])
def test_a_constant_that_is_not_defined_once_is_refused(
    constant: str, repository: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="defined once|is not NAME=VALUE"):
        _written(f"HEAD:{constant}=1", repository, tmp_path)


@pytest.mark.parametrize(
    "text", ["", ":kRows=1", ".:", ".:kRows", ".:kRows=1,,kCost=2", "--output=/tmp/x", ".:a b=1"]
)
def test_what_is_no_variant_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="variant"):
        Variant.parse(text)


def test_a_revision_that_git_does_not_know_is_refused(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="git has no kernels of revision 'v9'"):
        _written("v9", repository, tmp_path)


def test_only_what_has_changed_is_new_for_the_compiler(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    write_sources(Variant.parse("."), repository, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.h")}
    (repository / "kernels/src/plan.h").write_text("// other\n", encoding="utf-8")
    (repository / "kernels/src/kernels/amx.h").touch()
    write_sources(Variant.parse("."), repository, folder)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.h")}
    assert [path.name for path in before if after[path] != before[path]] == ["plan.h"]


def test_a_build_that_fails_says_what_the_compiler_said(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/CMakeLists.txt").write_text(
        'message(FATAL_ERROR "no such luck")\n', encoding="utf-8"
    )
    with pytest.raises(BertRTError, match="no such luck"):
        build(tmp_path, tmp_path / "build")


def test_builds_are_timed_in_turn_and_their_answers_compared() -> None:
    order: list[str] = []

    class Fake:
        vocab_size = 50

        def __init__(self, name: str, answer: float) -> None:
            self.name, self.answer = name, answer

        def prepare(self, ids: np.ndarray) -> tuple[Callable[[], None], np.ndarray]:
            assert ids.shape == (2, 3)
            assert 0 <= ids.min() <= ids.max() < self.vocab_size
            states = np.zeros((6, 4), np.float32)

            def run() -> None:
                order.append(self.name)
                states[:] = self.answer

            return run, states

    first, second, third = compare(
        [Fake("a", 1.0), Fake("b", 1.0), Fake("c", 0.75)],
        2,
        3,
        seconds=0.0,
    )
    assert (first.difference, second.difference, third.difference) == (0.0, 0.0, 0.25)
    assert first.ratio == 1.0
    assert first.runs == second.runs == 15
    assert first.tenth_ms <= first.median_ms
    turns = "".join(order[3:])
    assert turns == ("aaaabbbbcccc" + "ccccbbbbaaaa") * 2 + "aaaabbbbcccc"


def test_a_library_computes_what_the_engine_does(small_engine: Path) -> None:
    library = Library(Path(bertrt.get_library_dir()) / "libbertrt.so", str(small_engine), 2)
    ids = np.random.default_rng(1).integers(0, library.vocab_size, size=(3, 7)).astype(np.int32)
    run, states = library.prepare(ids)
    run()
    with Engine.load(small_engine, backend="native") as engine:
        assert (library.vocab_size, library.hidden_size) == (
            engine.architecture.vocab_size,
            engine.architecture.hidden_size,
        )
        assert library.longest == engine.architecture.max_position_embeddings
        for row, found in zip(ids, states.reshape(3, 7, -1), strict=True):
            tokens = TokenBatch(
                input_ids=row,
                token_type_ids=np.zeros(7, np.int32),
                offsets=np.array([0, 7], np.int64),
            )
            wanted = Wanted(hidden_states=True)
            np.testing.assert_array_equal(engine.backend.run(tokens, wanted).hidden_states, found)
        assert library.isa == engine.backend.isa
    library.close()


def test_an_engine_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    with pytest.raises(InputError, match="nothing"):
        Library(Path(bertrt.get_library_dir()) / "libbertrt.so", str(tmp_path / "nothing"), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine", ".", "."], "two variants are the same"),
        (["engine", ".", "--shape", "1x0"], "shape '1x0' is not BATCHxTOKENS"),
        (["engine", ".", "--shape", "8"], "shape '8' is not BATCHxTOKENS"),
        (["engine", ".", "--threads", "0"], "--threads '0' is not a positive number"),
    ],
)
def test_bad_input_ends_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_builds_compares_and_answers(
    small_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Compiling takes a minute for each build: those that are compared here are the installed one.
    installed = Path(bertrt.get_library_dir()) / "libbertrt.so"
    sources: list[Path] = []

    def build_nothing(folder: Path, _: Path) -> Path:
        sources.append(folder)
        return installed

    monkeypatch.setattr("tools.compare_kernels.__main__.build", build_nothing)
    options = ["--shape", "2x5", "--threads", "1,2", "--seconds", "0", "--work", str(tmp_path), "--json"]
    assert main([str(small_engine), ".", ".:kSoloRows=128", *options]) == 0
    assert "kSoloRows = 128;" in (sources[1] / "kernels/src/plan.h").read_text(encoding="utf-8")
    assert "kSoloRows = 128;" not in (sources[0] / "kernels/src/plan.h").read_text(encoding="utf-8")
    written = capsys.readouterr()
    rows = json.loads(written.out)["figures"]
    assert [(row["variant"], row["threads"], row["difference"]) for row in rows] == [
        (variant, threads, 0.0) for threads in (1, 2) for variant in (".", ".:kSoloRows=128")
    ]
    assert "same bits" in written.err
    assert main([str(small_engine), ".", "--shape", "1x51", "--work", str(tmp_path)]) == 2
    assert "too long" in capsys.readouterr().err
