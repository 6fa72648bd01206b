"""``bertrt build``: its options, what it prints, and its exit codes."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bertrt.cli as cli
from bertrt.backends.tensorrt.check import HEADER_SIZE, check_header, check_plan
from bertrt.backends.tensorrt.library import find_library, library_version
from bertrt.cli.command import EXIT_BAD_INPUT, EXIT_OK, Command
from bertrt.engine import Engine
from bertrt.errors import (
    EngineNotFoundError,
    HashMismatchError,
    InputError,
    ManifestError,
    MissingFileError,
    PlanBuildError,
    PlanMismatchError,
)
from bertrt.folder import MANIFEST_NAME, EngineFolder, record_files
from bertrt_export.commands import build
from bertrt_export.commands.build import COMMAND
from bertrt_export.plans import build as plans_build

RTX = ("--library", "tensorrt_rtx")
FEW = ("--profile", "1x1..1x8")
ROOT = Path(__file__).parents[2]


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMAND.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args([str(argument) for argument in arguments])


def run(*arguments: object) -> int:
    return COMMAND.run(parse(*arguments))


def test_what_it_prints(small_parts: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = small_parts("int8")
    profiles = ("--profile", "1x1..1x8..1x50", "--profile", "1x8..4x16")
    capabilities = ("--compute-capability", "12.0, 8.6", "--compute-capability", "8.9")
    assert run(path, *RTX, *profiles, *capabilities) == EXIT_OK
    output, errors = capsys.readouterr()
    assert errors == ""
    first, header, *parts, shapes, following = output.splitlines()
    version = library_version(find_library("tensorrt_rtx"))
    assert first.startswith(
        f"{path}: {EngineFolder.open(path).manifest.source.name}, int8, plans of tensorrt_rtx {version} for compute "
        "capability 8.6, 8.9, 12.0, "
    )
    assert re.search(r", \d+\.\d [kM]B, \d+\.\d s$", first)
    assert header.split() == ["part", "layers", "attention", "products", "plan", "seconds"]
    cells = [re.split(r"  +", line.strip()) for line in parts]
    report = EngineFolder.open(path).manifest.plan
    assert report is not None
    assert [row[0] for row in cells] == ["encoder", "mlm", "pooler"]
    assert [int(row[1]) for row in cells] == [report.report[row[0]]["layers"] for row in cells]
    assert [row[2] for row in cells] == ["3 fused", "none", "none"]
    assert [row[3] for row in cells] == ["12 int8", "1 float32, 1 float16", "2 float32"]
    assert shapes == "profiles: 1x1..1x8..1x50, 1x8..4x16..4x16"
    assert following == f"next: bertrt info {path}"


def test_attention_that_was_taken_apart(
    small_parts: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small_parts("fp32"), *RTX, *FEW) == EXIT_OK
    assert re.search(r"encoder +\d+ +3 taken apart +12 float32", capsys.readouterr().out)


def test_the_workspace_where_there_is_a_gpu_to_tell_it(
    small_parts: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans_build, "present_capability", lambda: "8.9")
    monkeypatch.setattr(plans_build, "inspect_plan", lambda module, data, part: {"device_memory": 4_200_000})
    assert run(small_parts(), *RTX, *FEW) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["workspace", "MB"]
    assert lines[2].endswith("  4.2 MB")


def test_json_is_one_line_and_nothing_else(
    small_parts: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_parts()
    assert run(path, *RTX, *FEW, "--json") == EXIT_OK
    output, errors = capsys.readouterr()
    assert errors == ""
    assert len(output.splitlines()) == 1
    result = json.loads(output)
    manifest = EngineFolder.open(path).manifest
    assert manifest.plan is not None
    files = {part: f"{part}.plan" for part in ("encoder", "mlm", "pooler")}
    assert result == {
        "engine": str(path),
        "precision": "fp16",
        **manifest.plan.to_json(),
        "files": files,
        "bytes": sum((path / name).stat().st_size for name in files.values()),
    }
    assert result["report"]["encoder"]["fused_attention"] == 3


def spoil_plan(path: Path, damage: str) -> None:
    plan, manifest = path / "mlm.plan", path / MANIFEST_NAME
    data = bytearray(plan.read_bytes())
    match damage:
        case "missing":
            plan.unlink()
        case "cut":
            plan.write_bytes(data[:5000])
        case "changed":
            data[100] ^= 1
            plan.write_bytes(data)
        case _:
            value = json.loads(manifest.read_text())
            if damage == "roles":
                value["backends"]["tensorrt"] = "mlm.plan"
            else:
                value["plan"] = 7 if damage == "type" else {**value["plan"], "profiles": ["9x9..1x1"]}
            manifest.write_text(json.dumps(value))


DAMAGES = ["missing", "cut", "changed", "type", "profile"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_built_again_by_the_command_that_the_error_names(
    damage: str, small_parts: Callable[..., Path]
) -> None:
    path = small_parts()
    run(path, *RTX, *FEW, "--compute-capability", "8.9,12.0")
    before = EngineFolder.open(path).manifest
    spoil_plan(path, damage)
    with pytest.raises((MissingFileError, HashMismatchError, ManifestError), match="plan") as caught:
        EngineFolder.open(path)
    if damage in {"type", "profile"}:
        # What the plan was built for is known no more.
        assert "build it again with 'bertrt build FOLDER'" in str(caught.value)
        arguments = [str(path), *RTX, *FEW, "--compute-capability", "8.9,12.0"]
    else:
        advice = str(caught.value).partition("build the plan again with: ")[2]
        program, name, *arguments = shlex.split(advice)
        assert (program, name) == ("bertrt", "build")
    assert run(*arguments) == EXIT_OK
    after = EngineFolder.open(path).manifest
    assert after.files.keys() == before.files.keys()
    assert before.plan is not None
    assert after.plan is not None
    assert after.plan.profiles == before.plan.profiles
    assert after.plan.compute_capabilities == before.plan.compute_capabilities


@pytest.mark.parametrize("damage", [*DAMAGES, "roles"])
def test_graphs_run_whatever_has_become_of_the_plan(
    damage: str, gpu_engine: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(gpu_engine("fp32"), tmp_path / "engine")
    with Engine.load(path, backend="onnxruntime", provider="cpu", threads=1) as engine:
        expected = engine.fill_mask("The man worked as a [MASK].")
    run(path, *RTX, *FEW)
    spoil_plan(path, damage)
    for how in (
        {"backend": "onnxruntime", "provider": "cpu"},
        {"backend": "onnxruntime"},
        {"provider": "cpu"},
    ):
        with Engine.load(path, threads=1, **how) as engine:
            assert engine.fill_mask("The man worked as a [MASK].") == expected
    with pytest.raises((MissingFileError, HashMismatchError, ManifestError)):
        EngineFolder.open(path)


def test_a_damaged_graph_is_exported_again(small_parts: Callable[..., Path]) -> None:
    path = small_parts()
    run(path, *RTX, *FEW)
    folder = EngineFolder.open(path)
    # Even if a manifest calls it a plan.
    roles = {**folder.manifest.backends["tensorrt"], "other": "mlm.onnx"}
    folder.replace_manifest(
        replace(folder.manifest, backends={**folder.manifest.backends, "tensorrt": roles})
    )
    (path / "mlm.onnx").write_bytes((path / "mlm.onnx").read_bytes()[:100])
    for open_it in (lambda: EngineFolder.open(path, verify=False), lambda: run(path, *RTX, *FEW)):
        with pytest.raises(
            HashMismatchError, match=r"'mlm\.onnx' .*: copy the folder again or export it anew"
        ):
            open_it()


class TestAPlanOfAnotherMachine:
    """Refused before it is deserialised; and the command that the refusal names builds the right one."""

    def check(self, path: Path) -> None:
        plan = EngineFolder.open(path).manifest.plan
        assert plan is not None
        module = find_library("tensorrt_rtx")
        here = {"library": module.__name__, "version": library_version(module), "compute_capability": "8.9"}
        check_plan(plan, path=path, **here)
        for name in ("encoder.plan", "mlm.plan", "pooler.plan"):
            check_header(plan, (path / name).read_bytes()[:HEADER_SIZE], path=path, name=name)

    def rebuild(self, refusal: str) -> None:
        program, name, *arguments = shlex.split(refusal.partition("build it again: ")[2])
        assert (program, name) == ("bertrt", "build")
        assert run(*arguments) == EXIT_OK

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": "1.6.0.12"}, "built by tensorrt_rtx 1.6.0.12, which alone reads it"),
            (
                {"library": "tensorrt", "version": "11.1.0.106"},
                "built by tensorrt 11.1.0.106, here is tensorrt_rtx",
            ),
            ({"compute_capabilities": ("12.0",)}, "for compute capability 12.0; this GPU has 8.9"),
        ],
    )
    def test_by_its_manifest(
        self, changes: dict[str, Any], message: str, small_parts: Callable[..., Path]
    ) -> None:
        path = small_parts()
        run(path, *RTX, *FEW, "--profile", "1x1..2x4..3x5")
        self.check(path)
        folder = EngineFolder.open(path)
        plan = folder.manifest.plan
        assert plan is not None
        folder.replace_manifest(replace(folder.manifest, plan=replace(plan, **changes)))
        with pytest.raises(PlanMismatchError, match=re.escape(message)) as caught:
            self.check(path)
        self.rebuild(str(caught.value))
        self.check(path)
        again = EngineFolder.open(path).manifest.plan
        assert again is not None
        assert again.profiles == plan.profiles
        assert again.compute_capabilities == ("8.9",)

    @pytest.mark.parametrize("position", [0, 24, 25, 26, 27])
    def test_by_its_first_bytes(self, position: int, small_parts: Callable[..., Path]) -> None:
        path = small_parts()
        run(path, *RTX, *FEW)
        folder = EngineFolder.open(path)
        data = bytearray((path / "mlm.plan").read_bytes())
        data[position] ^= 1
        (path / "mlm.plan").write_bytes(data)
        with pytest.raises(HashMismatchError, match=r"mlm\.plan"):
            EngineFolder.open(path)
        folder.replace_manifest(replace(folder.manifest, files=record_files(path)))
        with pytest.raises(PlanMismatchError, match=r"the TensorRT plan 'mlm\.plan' is ") as caught:
            self.check(path)
        self.rebuild(str(caught.value))
        self.check(path)


def test_every_option_reaches_the_builder(
    small_parts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        pass

    def build_plans(folder: EngineFolder, **options: Any) -> None:
        raise ReachedError(folder.path, options)

    monkeypatch.setattr(build, "build_plans", build_plans)
    path = small_parts()
    with pytest.raises(ReachedError) as caught:
        run(path, *RTX, *FEW, "--timing-cache", tmp_path / "cache", "--optimization-level", 4)
    folder, options = caught.value.args
    assert folder == path
    assert options.pop("progress")
    assert [str(profile) for profile in options.pop("profiles")] == ["1x1..1x8..1x8"]
    assert options == {
        "compute_capabilities": [],
        "timing_cache": tmp_path / "cache",
        "optimization_level": 4,
        "library": "tensorrt_rtx",
    }
    with pytest.raises(ReachedError) as caught:
        run(path)
    assert caught.value.args[1]["profiles"] == []
    assert caught.value.args[1]["library"] is None


@pytest.mark.parametrize("level", ["6", "-1", "fast", "٣", "03"])
def test_levels_that_there_are_not(level: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="a whole number from 0 to 5"):
        parse("engine", f"--optimization-level={level}")


def test_what_is_wrong_is_said(
    small_parts: Callable[..., Path], demo_engine: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(EngineNotFoundError, match="there is no engine folder"):
        run(tmp_path / "none")
    with pytest.raises(InputError, match="'1x' is no profile"):
        run(small_parts(), "--profile", "1x")
    with pytest.raises(InputError, match="'8' is no compute capability"):
        run(small_parts("bf16"), *RTX, "--compute-capability", "8.9,8")
    with pytest.raises(PlanBuildError, match="--target tensorrt"):
        run(demo_engine("fp32"))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The command as a program, whether its entry point has been installed or not."""
    path = tmp_path / "program.py"
    path.write_text(
        "import sys\nimport bertrt.cli as cli\nfrom bertrt_export.commands.build import COMMAND\n"
        "cli._load = lambda name: COMMAND\nsys.exit(cli.main())\n"
    )
    return path


def test_errors_are_one_line(program: Path, small_parts: Callable[..., Path]) -> None:
    result = subprocess.run(
        [sys.executable, program, "build", small_parts(), *RTX, *FEW, "--compute-capability", "9.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stdout == ""
    assert re.fullmatch(
        r"bertrt: error: tensorrt_rtx .* does not build for compute capability 9\.0.*\n", result.stderr
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_build_and_leaves_nothing(
    number: signal.Signals, program: Path, small_parts: Callable[..., Path]
) -> None:
    path = small_parts()
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    # The builder says when it has begun, and waits until the signal is there.
    watched = program.with_name("watched.py")
    watched.write_text(
        "import os, sys, time\nfrom bertrt_export.plans.builder import Steps\nreal = Steps.step\n"
        "def step(self):\n"
        "    print('begun', flush=True)\n"
        "    while not self._stopped.is_set():\n"
        "        time.sleep(0.01)\n"
        "    return real(self)\n"
        "Steps.step = step\n" + program.read_text()
    )
    with subprocess.Popen(
        [sys.executable, watched, "build", path, *RTX, *FEW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        output, errors = process.communicate()
    assert process.returncode == 128 + number
    assert output == ""
    assert errors == ("bertrt: error: interrupted\n" if number == signal.SIGINT else "")
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before


def test_it_is_a_command_of_the_distribution() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert points["bertrt.commands"]["build"] == "bertrt_export.commands.build:COMMAND"
    assert isinstance(COMMAND, Command)
    assert COMMAND.name == "build"
    assert {"build": COMMAND.help}.items() <= cli._GROUPS["make an engine"].items()
    assert all(line.startswith("bertrt build ") for line in COMMAND.example.splitlines())


def test_the_examples_parse() -> None:
    for line in COMMAND.example.splitlines():
        assert parse(*line.split()[2:]).engine == Path("engine")
