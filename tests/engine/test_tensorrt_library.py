"""Finding TensorRT, and keeping what it says."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import threading
from types import ModuleType

import pytest

from bertrt.backends.tensorrt import library as trt_library
from bertrt.backends.tensorrt.library import (
    LIBRARIES,
    Messages,
    collect_messages,
    describe_library,
    find_library,
    library_logger,
    library_problem,
    library_version,
)
from bertrt.errors import BackendUnavailableError, InputError


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let exactly these libraries be installed; one without a version cannot say it."""
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    for name, version in versions.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        if version is not None:
            module.__version__ = version
        monkeypatch.setitem(sys.modules, name, module)


def test_the_library_of_the_tests_is_found() -> None:
    module = find_library("tensorrt_rtx")
    assert module.__name__ == "tensorrt_rtx"
    assert library_version(module).count(".") == 3
    assert describe_library("tensorrt_rtx") == f"tensorrt_rtx {module.__version__}"
    assert library_problem("tensorrt_rtx") is None
    assert library_problem() is None


def test_tensorrt_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.1.0.106", tensorrt_rtx="1.7.1.116")
    assert describe_library() == "tensorrt 11.1.0.106"
    assert describe_library("tensorrt_rtx") == "tensorrt_rtx 1.7.1.116"
    install(monkeypatch, tensorrt_rtx="1.7.1.116")
    assert describe_library() == "tensorrt_rtx 1.7.1.116"


def test_without_any_both_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    problem = library_problem()
    assert problem is not None
    assert problem.startswith("neither tensorrt nor tensorrt_rtx is installed")
    assert 'pip install "bertrt[tensorrt]"' in problem
    assert 'pip install "bertrt[tensorrt-rtx]"' in problem
    with pytest.raises(BackendUnavailableError, match=r"^tensorrt is not installed; .*bertrt\[tensorrt\]"):
        find_library("tensorrt")


def test_one_that_does_not_load_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt=None, tensorrt_rtx="1.7.1.116")
    with pytest.raises(BackendUnavailableError, match="tensorrt is installed but does not load"):
        find_library()


@pytest.mark.parametrize(
    ("name", "version", "enough"),
    [
        ("tensorrt", "10.16.1.11", False),
        ("tensorrt", "11.0.0.1", True),
        ("tensorrt_rtx", "1.6.9.9", False),
        ("tensorrt_rtx", "2.0", True),
    ],
)
def test_releases_that_choose_types_themselves_are_refused(
    name: str, version: str, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **{name: version})
    if enough:
        assert describe_library() == f"{name} {version}"
    else:
        with pytest.raises(BackendUnavailableError, match=rf"{name} {version} is too old.* --upgrade$"):
            find_library()


def test_an_unknown_library_is_an_input_error() -> None:
    with pytest.raises(InputError, match="choose tensorrt or tensorrt_rtx"):
        find_library("openvino")


def test_importing_the_module_loads_no_library() -> None:
    code = (
        "import sys; import bertrt.backends.tensorrt.library, bertrt.backends.tensorrt.check; "
        "print([name for name in sys.modules if name.startswith('tensorrt')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def provoke() -> None:
    """Make the library complain: a model that is none."""
    module = find_library("tensorrt_rtx")
    # The parser does not keep its network alive.
    network = module.Builder(library_logger(module)).create_network()
    assert not module.OnnxParser(network, library_logger(module)).parse(b"no model")


def test_what_the_library_says_is_kept_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with collect_messages() as messages:
        provoke()
    assert any("Failed to parse the ONNX model" in message for message in messages.errors)
    assert capfd.readouterr() == ("", "")
    count = len(messages.errors)
    provoke()
    assert len(messages.errors) == count


def test_each_thread_hears_its_own() -> None:
    heard: list[Messages] = []

    def listen() -> None:
        with collect_messages() as messages:
            provoke()
        heard.append(messages)

    with collect_messages() as outer:
        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
    assert heard[0].errors
    assert outer == Messages()


def test_threads_of_the_library_are_heard_by_whoever_listens() -> None:
    with collect_messages() as messages:
        # Where nobody listens in the thread itself.
        thread = threading.Thread(target=provoke)
        thread.start()
        thread.join()
    assert messages.errors


def test_blocks_inside_each_other_both_hear() -> None:
    with collect_messages() as outer:
        with collect_messages() as inner:
            provoke()
        count = len(outer.errors)
        assert inner.errors == outer.errors
        provoke()
    assert len(outer.errors) > count == len(inner.errors)


def test_memory_for_messages_is_bounded() -> None:
    logger = library_logger(find_library("tensorrt_rtx"))
    severity = find_library("tensorrt_rtx").ILogger
    with collect_messages() as messages:
        for _ in range(1000):
            logger.log(severity.ERROR, "x" * 10_000)
        logger.log(severity.WARNING, "look")
        logger.log(severity.INFO, "chatter")
    assert len(messages.errors) == 256
    assert {len(message) for message in messages.errors} == {4096}
    assert messages.warnings == ["look"]


def test_there_is_one_logger_for_each_library() -> None:
    module = find_library("tensorrt_rtx")
    assert library_logger(module) is library_logger(module)
    assert trt_library.library_logger(module) is module.Builder(library_logger(module)).logger
