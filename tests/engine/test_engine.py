"""The engine as an object: loading, closing, arguments of every kind, missing heads, batches."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bertrt.backends.registry
from bertrt.backends.base import BatchOutput
from bertrt.engine import Engine
from bertrt.errors import (
    BackendRunError,
    EngineClosedError,
    EngineFolderError,
    EngineNotFoundError,
    HashMismatchError,
    InputError,
    ManifestError,
    MissingHeadError,
    ShapeMismatchError,
    TextEncodingError,
    TokenizerError,
)
from bertrt.folder import EngineFolder, record_files, write_folder
from bertrt.manifest import Heads, Manifest, Source
from bertrt.tokenization import TokenizerSettings, WordPieceTokenizer

# Every question with one text, and with what texts are asked instead.
QUESTIONS = {
    "fill_mask": lambda engine, texts: engine.fill_mask(texts),
    "next_sentence": lambda engine, texts: engine.next_sentence(texts, texts),
    "features": lambda engine, texts: engine.features(texts),
    "score": lambda engine, texts: engine.score(texts),
}
each_question = pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)


@pytest.fixture
def folder(tmp_path: Path, demo_checkpoint: Path, architecture: Any) -> Path:
    """An engine folder with the demo's tokenizer, for a backend that reads nothing."""
    out = tmp_path / "small-engine"
    with write_folder(out) as partial:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_checkpoint / name, partial / name)
        manifest = Manifest(
            source=Source(kind="random", name="small", seed=0),
            architecture=architecture,
            precision="fp32",
            dialect="ort",
            heads=Heads(mlm=True, nsp=True, pooler=True),
            backends={"torch": {}},
            files=record_files(partial),
        )
        (partial / "engine.json").write_text(manifest.to_json(), encoding="utf-8")
    return out


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, make_engine: Any) -> list[Any]:
    """Makes `Engine.load` take a PyTorch backend; holds what was asked of the registry and what it gave."""
    calls: list[Any] = []

    def create(
        name: str | None, opened: EngineFolder, threads: int | None, *, verify: bool, **placement: Any
    ) -> Any:
        assert placement == {"provider": None, "devices": ()}
        calls.append((name, opened.path, threads, make_engine().backend))
        return calls[-1][-1]

    monkeypatch.setattr(bertrt.backends.registry, "create_backend", create)
    return calls


def test_load(folder: Path, registry: list[Any]) -> None:
    with Engine.load(folder, backend="torch", threads=3) as engine:
        assert registry == [("torch", folder, 3, engine.backend)]
        assert engine.path == folder
        assert engine.manifest is not None
        assert engine.latency_only
        assert repr(engine) == "Engine('small-engine', backend='torch', precision='fp32')"
        assert engine.fill_mask("The man worked as a [MASK].", top_k=1)[0]["token_str"]
    assert engine.backend.closed == 1
    assert repr(engine).endswith("closed)")


def test_load_takes_a_text_too(folder: Path, registry: list[Any]) -> None:
    assert Engine.load(str(folder)).path == folder
    assert registry[0][:3] == (None, folder, None)


def test_load_verifies_unless_told_not_to(folder: Path, registry: list[Any]) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))  # the same JSON, and the same size
    with pytest.raises(HashMismatchError):
        Engine.load(folder)
    assert Engine.load(folder, verify=False).tokenizer.vocab_size == 8192


def test_load_hashes_what_it_reads(demo_engine: Any, tmp_path: Path) -> None:
    """Neither the files of other backends nor those for other tools."""
    target = Path(shutil.copytree(demo_engine("int8"), tmp_path / "engine"))
    for name in ("model.bertrt", "model.onnx", "config.json"):
        path = target / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    with pytest.raises(HashMismatchError):
        EngineFolder.open(target)
    with Engine.load(target, backend="onnxruntime", threads=1) as engine:
        assert engine.backend.name == "onnxruntime"
    data = bytearray((target / "engine.onnx").read_bytes())
    data[-2] ^= 1
    (target / "engine.onnx").write_bytes(data)
    with pytest.raises(HashMismatchError, match=r"engine\.onnx"):
        Engine.load(target, backend="onnxruntime", threads=1)


def test_load_of_nothing(tmp_path: Path, registry: list[Any]) -> None:
    with pytest.raises(EngineNotFoundError, match="there is no engine folder"):
        Engine.load(tmp_path / "nowhere")
    with pytest.raises(EngineNotFoundError, match=r"has no engine\.json"):
        Engine.load(tmp_path)


def test_load_without_a_tokenizer_makes_no_backend(folder: Path, registry: list[Any]) -> None:
    opened = EngineFolder.open(folder)
    (folder / "tokenizer.json").unlink()
    files = {"tokenizer_config.json": opened.manifest.files["tokenizer_config.json"]}
    opened.replace_manifest(replace(opened.manifest, files=files))
    with pytest.raises(ManifestError, match=r"'tokenizer\.json' is not among 'files'"):
        Engine.load(folder)
    assert registry == []


def test_a_tokenizer_that_cannot_be_read_makes_no_backend(folder: Path, registry: list[Any]) -> None:
    text = (folder / "engine.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}")
    files = record_files(folder)
    (folder / "engine.json").write_text(replace(Manifest.from_json(text), files=files).to_json())
    with pytest.raises(TokenizerError):
        Engine.load(folder)
    assert registry == []


def put_in_place(source: Path, target: Path) -> None:
    """As an export with --overwrite does; a folder is new each time."""
    with write_folder(target, overwrite=True) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("failing", [False, True])
def test_a_folder_that_is_replaced_while_it_is_loaded(
    demo_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, failing: bool
) -> None:
    """Replaced once or twice, it is loaded again, whole; each time, that is said."""
    target = tmp_path / "engine"
    shutil.copytree(demo_engine("fp32"), target)
    create = bertrt.backends.registry.create_backend
    made: list[Any] = []

    def replacing(
        name: str | None, opened: EngineFolder, threads: int | None, *, verify: bool, **placement: Any
    ) -> Any:
        if len(made) < times:
            put_in_place(demo_engine("int8" if opened.manifest.precision == "fp32" else "fp32"), target)
        made.append(opened.manifest.precision)
        if failing and len(made) <= times:
            raise BackendRunError("half of one model, half of another")
        return create(name, opened, threads, verify=verify, **placement)

    monkeypatch.setattr(bertrt.backends.registry, "create_backend", replacing)
    if times == 3:
        with pytest.raises(EngineFolderError, match="the folder was replaced while it was loaded"):
            Engine.load(target, threads=1)
        assert len(made) == 3
        return
    with Engine.load(target, threads=1) as engine:
        assert len(made) == times + 1
        assert engine.manifest == EngineFolder.open(target).manifest
        with Engine.load(demo_engine(made[-1]), threads=1) as right:
            text = "The man worked as a [MASK]."
            assert engine.fill_mask(text) == right.fill_mask(text)


def test_a_fault_of_a_folder_that_stays_is_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*asked: Any, verify: bool, **placement: Any) -> Any:
        calls.append(asked)
        raise BackendRunError("out of memory")

    monkeypatch.setattr(bertrt.backends.registry, "create_backend", fail)
    with pytest.raises(BackendRunError, match="out of memory"):
        Engine.load(folder)
    assert len(calls) == 1


def test_loads_while_another_thread_replaces_the_folder(demo_engine: Any, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    text = "The man worked as a [MASK]."
    answers = {}
    for precision in ("fp32", "int8"):
        with Engine.load(demo_engine(precision), threads=1) as engine:
            answers[precision] = engine.fill_mask(text)
    assert answers["fp32"] != answers["int8"]
    shutil.copytree(demo_engine("fp32"), target)

    def alternate() -> None:
        for count in range(20):
            put_in_place(demo_engine("fp32" if count % 2 else "int8"), target)

    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(alternate)
        for _ in range(20):
            try:
                engine = Engine.load(target, threads=1)
            except EngineFolderError as error:
                # Each time that it was tried. That there is no folder at any moment is never said.
                assert "was replaced" in str(error)
                assert not isinstance(error.__cause__, EngineNotFoundError)
                continue
            with engine:
                assert engine.manifest is not None
                assert engine.fill_mask(text) == answers[engine.manifest.precision]
        replacing.result()
    with Engine.load(target, threads=1) as engine:
        assert engine.fill_mask(text) == answers["fp32"]


def test_load_closes_the_backend_when_the_tokenizer_does_not_fit(
    folder: Path, registry: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(9000))]
    large = WordPieceTokenizer.from_vocab(words, TokenizerSettings())
    monkeypatch.setattr(WordPieceTokenizer, "from_folder", lambda path, names: large)
    with pytest.raises(ShapeMismatchError, match="9005 tokens, its model has 8192"):
        Engine.load(folder)
    assert registry[0][-1].closed == 1


@pytest.mark.parametrize("budget", [0, -5, 1.5, True, "many"])
def test_the_token_budget_is_checked(
    make_engine: Any, folder: Path, registry: list[Any], budget: Any
) -> None:
    with pytest.raises(InputError, match="token_budget must be a whole number of at least 1"):
        make_engine(token_budget=budget)
    with pytest.raises(InputError, match="token_budget"):
        Engine.load(folder, token_budget=budget)
    assert registry == []


@each_question
def test_a_closed_engine_says_so(engine: Engine, question: Any) -> None:
    engine.close()
    engine.close()
    for texts in ("a [MASK]", []):
        with pytest.raises(EngineClosedError, match=r"is closed; load it again with Engine\.load"):
            question(engine, texts)


def test_an_engine_from_parts(engine: Engine) -> None:
    assert engine.manifest is None
    assert engine.path is None
    assert engine.name == "torch"
    assert not engine.latency_only


@each_question
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (b"a [MASK]", "is bytes, expected str: decode it first"),
        (bytearray(b"a"), "is bytearray, expected str"),
        (memoryview(b"a"), "is memoryview, expected str"),
        (None, "must be a str or a sequence of str, got NoneType"),
        (7, "must be a str or a sequence of str, got int"),
        ({"a": "b"}, "got dict: pass a list"),
        ({"a [MASK]"}, "got set: pass a list"),
        (["a [MASK]", b"a [MASK]"], r"\[1\] is bytes, expected str"),
        (["a [MASK]", None], r"\[1\] is NoneType, expected str"),
        ([["a [MASK]"]], r"\[0\] is list, expected str"),
    ],
)
def test_what_is_no_text(engine: Engine, question: Any, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        question(engine, texts)
    assert engine.backend.requests == []


@each_question
def test_a_lone_surrogate_is_named(engine: Engine, question: Any) -> None:
    with pytest.raises(TextEncodingError, match="1"):
        question(engine, ["a [MASK]", "a [MASK] \ud800"])


@each_question
def test_sequences_and_iterators_of_any_kind(engine: Engine, question: Any) -> None:
    texts = ["a man [MASK]", "the [MASK]"]
    expected = question(engine, texts)
    for same in (tuple(texts), np.array(texts)):
        assert_same(question(engine, same), expected)
    if question is not QUESTIONS["next_sentence"]:  # which reads its argument twice here
        assert_same(question(engine, (text for text in texts)), expected)
    else:
        assert engine.next_sentence(iter(texts), iter(texts)) == expected


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize(
    ("heads", "impossible", "able"),
    [
        (
            Heads(mlm=False, nsp=True, pooler=True),
            ["fill_mask", "score"],
            "can do next_sentence, features with pooling 'none', 'cls', 'mean' or 'pooler'",
        ),
        (
            Heads(mlm=True, nsp=False, pooler=True),
            ["next_sentence"],
            "can do fill_mask, score, features with pooling 'none', 'cls', 'mean' or 'pooler'",
        ),
        (
            Heads(mlm=True, nsp=False, pooler=False),
            ["next_sentence", "pooler"],
            "can do fill_mask, score, features with pooling 'none', 'cls', 'mean':",
        ),
        (
            Heads(mlm=False, nsp=False, pooler=False),
            ["fill_mask", "score", "next_sentence", "pooler"],
            "can do features with pooling 'none', 'cls', 'mean':",
        ),
    ],
)
def test_missing_heads(make_engine: Any, heads: Heads, impossible: list[str], able: str) -> None:
    engine = make_engine(heads=heads, name="half")
    questions = {**QUESTIONS, "pooler": lambda engine, texts: engine.features(texts, pooling="pooler")}
    for name, question in questions.items():
        for texts in ("a [MASK]", ["a [MASK]"]):
            if name in impossible:
                with pytest.raises(MissingHeadError) as caught:
                    question(engine, texts)
                assert "the checkpoint of engine 'half' does not have" in str(caught.value)
                assert able in str(caught.value)
                assert name in str(caught.value)
            else:
                question(engine, texts)


@each_question
def test_batches_keep_to_the_token_budget(make_engine: Any, prose: list[str], question: Any) -> None:
    engine = make_engine(token_budget=100)
    texts = [f"{line[:50]} [MASK]" for line in prose[:8]] + ["a [MASK]"]
    question(engine, texts)
    assert len(engine.backend.requests) > 1
    for batch, _ in engine.backend.requests:
        assert batch.num_sequences == 1 or batch.lengths.max() * batch.num_sequences <= 100


def test_answers_come_in_the_order_of_the_questions(make_engine: Any) -> None:
    """Texts that sorting by length turns round, in many batches."""
    engine = make_engine(token_budget=20)
    texts = [" ".join(["a"] * count) + " [MASK]" for count in (3, 9, 1, 5, 5, 7, 2)]
    assert [len(array) for array in engine.features(texts)] == [6, 12, 4, 8, 8, 10, 5]
    assert [found.tokens for found in engine.score(texts)] == [3, 9, 1, 5, 5, 7, 2]
    starts = [answer[0]["sequence"].count("a ") for answer in engine.fill_mask(texts, targets="man")]
    assert starts == [3, 9, 1, 5, 5, 7, 2]


def test_a_backend_that_leaves_something_out_is_an_error(engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine.backend, "run", lambda batch, wanted: BatchOutput())
    for question in QUESTIONS.values():
        with pytest.raises(BackendRunError, match="did not return what was asked"):
            question(engine, "a [MASK]")
