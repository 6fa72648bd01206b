"""The command itself: how it finds subcommands, and what it makes of their failures."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import bertrt
from bertrt import cli
from bertrt.cli import main
from bertrt.cli.command import EXIT_BAD_INPUT, EXIT_CHECK_FAILED, EXIT_OK

Plant = Callable[..., None]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

ALL = {
    "export",
    "build",
    "info",
    "fill-mask",
    "next-sentence",
    "features",
    "drift",
    "bench",
    "demo",
    "doctor",
}
BUILT_IN = ["info", "fill-mask", "next-sentence", "features", "doctor"]

PLUGIN = """
from bertrt.cli.command import Command
from bertrt.cli.console import emit

def _add_arguments(parser):
    parser.add_argument("first")
    parser.add_argument("more", nargs="*", default=[])
    parser.add_argument("--many", type=int, default=1)
    {arguments}

def _run(args):
    {run}
    emit(sorted(vars(args).items()), as_json=True)
    return 1

COMMAND = Command(name="probe", help="probe things", example="bertrt probe x", add_arguments=_add_arguments,
                  run=_run)
"""


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """A function that installs a distribution with the command ``probe``."""

    def plant(*, arguments: str = "pass", run: str = "pass", source: str | None = None) -> None:
        module = f"probe_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source or PLUGIN.format(arguments=arguments, run=run))
        information = tmp_path / "probe-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[bertrt.commands]\nprobe = {module}:COMMAND\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path[1:]]))

    return plant


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error, without what every error begins with."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    start, _, message = captured.err.partition("bertrt: error: ")
    assert start == ""
    return message.rstrip("\n")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == EXIT_OK
    captured = capsys.readouterr()
    shown = {line.split()[0] for line in captured.out.splitlines() if line.startswith("  ")}
    assert shown >= ALL
    assert "bertrt fill-mask demo" in captured.out
    assert captured.err == ""
    assert main([]) == EXIT_BAD_INPUT
    assert capsys.readouterr() == ("", captured.out)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == EXIT_OK
    assert capsys.readouterr().out == f"bertrt {bertrt.__version__}\n"


@pytest.mark.parametrize("name", BUILT_IN)
def test_help_of_a_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == EXIT_OK
    out = capsys.readouterr().out
    assert out.startswith(f"usage: bertrt {name} ")
    assert "--json" in out
    assert f"\nexample:\n  bertrt {name}" in out


def test_the_overview_says_what_the_commands_say() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    places = {name: f"{module}:COMMAND" for name, module in cli._BUILT_IN.items()}
    places |= project["entry-points"][cli.ENTRY_POINT_GROUP]
    assert set(places) == ALL
    for name, line in [line for commands in cli._GROUPS.values() for line in commands.items()]:
        command = pkgutil.resolve_name(places[name])
        assert (command.name, command.help) == (name, line)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fil-mask", "there is no command 'fil-mask'; did you mean 'fill-mask'?"),
        ("xyzzy", "there is no command 'xyzzy'; see 'bertrt --help'"),
        ("--json", "there is no option '--json'; see 'bertrt --help'"),
        ("", "there is no command ''; see 'bertrt --help'"),
    ],
)
def test_an_unknown_command(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == EXIT_BAD_INPUT
    assert error_line(capsys) == message


def test_a_known_command_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert main(["export"]) == EXIT_BAD_INPUT
    assert "pip install bertrt" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info"], "the following arguments are required: ENGINE"),
        (["fill-mask"], "the following arguments are required: ENGINE"),
        (["info", "x", "y"], "one argument too many: 'y'"),
        (["info", "x", "--what", "y"], "there is no option '--what'"),
        (["info", "x", "--ver"], "there is no option '--ver'"),
        (["fill-mask", "x", "--threads", "0"], "argument --threads: expected a whole number of at least 1"),
        (["fill-mask", "x", "--top-k", "9" * 5000], "argument --top-k: expected a whole number"),
        (["fill-mask", "x", "--top-k", "٣"], "argument --top-k: expected a whole number"),
        (["fill-mask", "x", "--stride", "-1"], "argument --stride: expected "),
        (["fill-mask", "x", "--overflow", "wrap"], "argument --overflow: invalid choice: 'wrap'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == EXIT_BAD_INPUT
    line = error_line(capsys)
    assert line.startswith(message)
    assert line.endswith(f"; see 'bertrt {arguments[0]} --help'")


def test_commands_of_other_packages(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant()
    assert main(["--help"]) == EXIT_OK
    assert "probe          added by another package" in capsys.readouterr().out
    assert main(["probe", "--help"]) == EXIT_OK
    assert capsys.readouterr().out.rstrip().endswith("example:\n  bertrt probe x")


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "b", "c", "--many", "3", "--json"],
        ["--many", "3", "--json", "a", "b", "c"],
        ["a", "--many", "3", "b", "--json", "c"],
        ["a", "--many=3", "--json", "--", "b", "c"],
    ],
)
def test_options_may_stand_anywhere(
    arguments: list[str], plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    plant()
    assert main(["probe", *arguments]) == EXIT_CHECK_FAILED
    assert dict(json.loads(capsys.readouterr().out)) == {
        "first": "a",
        "more": ["b", "c"],
        "many": 3,
        "json": True,
    }


def test_a_text_may_begin_with_a_dash(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant()
    assert main(["probe", "a", "- b c", "--", "--json"]) == EXIT_CHECK_FAILED
    found = dict(json.loads(capsys.readouterr().out))
    assert found["more"] == ["- b c", "--json"]
    assert found["json"] is False


def test_a_command_may_have_its_own_json(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(arguments='parser.add_argument("--json", metavar="FILE")')
    assert main(["probe", "a", "--json", "file"]) == EXIT_CHECK_FAILED
    assert dict(json.loads(capsys.readouterr().out))["json"] == "file"


def test_a_command_may_have_subcommands(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(arguments='parser.add_subparsers(dest="what").add_parser("it")')
    assert main(["probe", "a", "b", "it"]) == EXIT_CHECK_FAILED
    assert dict(json.loads(capsys.readouterr().out))["what"] == "it"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("from bertrt.errors import InputError; raise InputError('one\\ntwo')", 2, "one two"),
        ("raise OSError(28, 'No space left on device', 'f')", 2, "No space left on device (f); make room"),
        ("raise OSError(30, 'Read-only file system')", 2, "Read-only file system; choose a place"),
        ("raise TimeoutError", 2, "TimeoutError"),
        ("raise MemoryError", 2, "not enough memory"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise RuntimeError('what')", 2, "unexpected RuntimeError: what; this is a defect"),
        ("assert False", 2, "unexpected AssertionError: "),
        ("import onnx_is_not_here", 2, "unexpected ModuleNotFoundError: No module named 'onnx_is_not_here'"),
    ],
)
def test_a_failure_is_one_line(
    failure: str, code: int, message: str, plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run=failure)
    assert main(["probe", "a"]) == code
    assert error_line(capsys).startswith(message)


@pytest.mark.parametrize("module", ["onnx.helper", "huggingface_hub", "onnxruntime"])
@pytest.mark.parametrize("when", ["import", "run"])
def test_a_missing_extra_is_named(
    module: str, when: str, plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = f"raise ModuleNotFoundError('No module named x', name={module!r})"
    plant(run=failure) if when == "run" else plant(source=failure)
    assert main(["probe", "a"]) == EXIT_BAD_INPUT
    assert error_line(capsys) == (
        f"'bertrt probe' needs {module.split('.')[0]}, which is not installed; "
        'run: pip install "bertrt[export,ort]"'
    )


def test_a_missing_reference_is_named(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(run="raise ModuleNotFoundError('No module named torch', name='torch')")
    assert main(["probe", "a"]) == EXIT_BAD_INPUT
    assert 'pip install "bertrt[export,ort,torch]"' in error_line(capsys)


def test_an_entry_point_that_is_no_command(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(source="COMMAND = 7")
    assert main(["probe"]) == EXIT_BAD_INPUT
    assert "is not a bertrt command" in error_line(capsys)


def test_the_traceback_comes_when_asked_for(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run="raise OSError(28, 'full')")
    monkeypatch.setenv("BERTRT_TRACEBACK", "1")
    assert main(["probe", "a"]) == EXIT_BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("bertrt: error: full; ")


@pytest.fixture
def run_python() -> RunPython:
    def run(*arguments: str, then: str = "") -> subprocess.CompletedProcess[str]:
        program = f'"{sys.executable}" -m bertrt "$@" {then}'
        command = ["bash", "-c", program, "bash", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_a_reader_that_leaves_is_no_error(plant: Plant, run_python: RunPython) -> None:
    plant(run="for number in range(100_000): emit(number, as_json=True)")
    result = run_python("probe", "a", then='| head -n 1; echo "${PIPESTATUS[0]}"')
    assert result.stdout == f"0\n{128 + 13}\n"
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info", "--help"], ["probe", "a"]])
def test_a_full_disk_is_reported(arguments: list[str], plant: Plant, run_python: RunPython) -> None:
    plant()
    result = run_python(*arguments, then="> /dev/full")
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stderr.startswith(f"bertrt: error: {os.strerror(errno.ENOSPC)}; ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("then", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs(then: str, plant: Plant, run_python: RunPython) -> None:
    plant()
    result = run_python("probe", "a", then=then)
    assert result.returncode == EXIT_CHECK_FAILED
    assert result.stderr == ""
    assert run_python("info", "/nowhere", then=then).returncode == EXIT_BAD_INPUT


@pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("HUP", 129), ("INT", 130)])
def test_a_signal_lets_the_command_clean_up(
    signal: str, code: int, plant: Plant, run_python: RunPython, tmp_path: Path
) -> None:
    path = tmp_path / "half-written"
    plant(
        run=f"""
    import os, pathlib, signal, threading
    path = pathlib.Path({str(path)!r})
    try:
        path.touch()
        os.kill(os.getpid(), signal.SIG{signal})
        threading.Event().wait(30)
    finally:
        path.unlink()"""
    )
    # A shell without job control lets a program in the background ignore interrupts; this one is in front.
    assert run_python("probe", "a").returncode == code
    assert not path.exists()


def test_an_ignored_signal_stays_ignored(plant: Plant, run_python: RunPython) -> None:
    plant(run="import os, signal; os.kill(os.getpid(), signal.SIGHUP)")
    result = subprocess.run(
        ["bash", "-c", f"trap '' HUP; exec '{sys.executable}' -m bertrt probe a"], check=False
    )
    assert result.returncode == EXIT_CHECK_FAILED


def test_help_and_commands_load_only_what_they_need() -> None:
    code = (
        "import sys; from bertrt.cli import main; main(['--help']); main(['info', '--help']);"
        "heavy = {'numpy', 'tokenizers', 'onnxruntime', 'torch', 'transformers', 'onnx', 'bertrt_export',"
        " 'bertrt_bench', 'bertrt.cli.doctor', 'bertrt.cli.fill_mask'};"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "set()\n"


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "/nowhere/\x1b[2Jx\x07\udcff"]) == EXIT_BAD_INPUT
    assert main(["info", "x", "\x1b[2J\x9b"]) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert err.replace("\n", "").isprintable()
    assert "x1b[2J" in err
