"""Imports run one way, and `import bertrt` is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bertrt

ROOT = Path(__file__).parents[2]
ABOVE_THE_RUNTIME = {
    "bertrt_bench",
    "bertrt_export",
    "huggingface_hub",
    "ml_dtypes",
    "onnx",
    "optimum",
    "safetensors",
    "torch",
    "transformers",
}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after it ran ``code``."""
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_import_bertrt_loads_nothing_but_the_standard_library() -> None:
    own = {name for name in loaded_after("import bertrt") - loaded_after("") if "." not in name}
    assert own - set(sys.stdlib_module_names) == {"bertrt"}


def test_the_engine_loads_neither_the_exporter_nor_a_backend() -> None:
    loaded = loaded_after("from bertrt import Engine")
    assert {"bertrt.engine", "numpy", "tokenizers"} <= loaded
    assert not loaded & {*ABOVE_THE_RUNTIME, "onnxruntime", "importlib.metadata"}


def test_no_module_of_the_runtime_loads_what_lies_above_it() -> None:
    loaded = loaded_after(
        "import importlib, pkgutil, bertrt\n"
        "for module in pkgutil.walk_packages(bertrt.__path__, 'bertrt.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)"
    )
    assert "bertrt.backends.onnxruntime.backend" in loaded
    assert not loaded & ABOVE_THE_RUNTIME


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Top-level package of each import, and whether it is executed when the module is imported."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be checked"
            yield (node.module or "").split(".")[0], at_import
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not inside)

    yield from visit(tree, True)


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", sources("engine/bertrt"), ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_of_the_runtime(path: Path) -> None:
    names = {name for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))}
    backend = {"onnxruntime"} if path.parent == ROOT / "engine/bertrt/backends/onnxruntime" else set()
    allowed = {*sys.stdlib_module_names, "bertrt", "numpy", "tokenizers", *backend}
    assert names - allowed == set()


@pytest.mark.parametrize(
    "path", sources("export/bertrt_export"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_sources_of_the_exporter(path: Path) -> None:
    """It does not know the benchmarks, and needs PyTorch only where a function does."""
    found = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
    assert "bertrt_bench" not in {name for name, _ in found}
    assert not {name for name, at_import in found if at_import} & {"torch", "transformers", "optimum"}


def test_the_native_backend_needs_no_other_library(demo_engine: Callable[..., Path]) -> None:
    """An engine is loaded and asked, and neither the other backend's library nor the exporter is touched."""
    pytest.importorskip("bertrt._native", reason="the native kernels are not built")
    folder = str(demo_engine("int8"))
    loaded = loaded_after(
        f"from bertrt import Engine\nwith Engine.load({folder!r}, threads=1) as engine:\n"
        "    assert engine.backend.name == 'native'\n    engine.fill_mask('The [MASK].')"
    )
    assert "bertrt.backends.native" in loaded
    assert not loaded & {*ABOVE_THE_RUNTIME, "onnxruntime", "bertrt.backends.onnxruntime"}


def test_the_public_names() -> None:
    assert bertrt.__all__ == sorted(set(bertrt.__all__))
    for name in bertrt.__all__:
        assert getattr(bertrt, name) is not None
        assert name in dir(bertrt)
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = bertrt.Motor  # type: ignore[attr-defined]


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from bertrt import *", names)  # noqa: S102 - a star import is not allowed inside a function
    assert set(bertrt.__all__) <= set(names)


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert bertrt.__version__ == project["version"]
