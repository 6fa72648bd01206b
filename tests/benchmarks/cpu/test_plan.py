"""What is measured on which machine, and with which command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from bertrt.errors import InputError
from bertrt_bench import command as bench
from bertrt_bench.cpu.abilities import Abilities
from bertrt_bench.cpu.options import CpuOptions
from bertrt_bench.cpu.plan import Step, chosen, planned
from bertrt_export.commands import drift, export

OTHERS = ("avx512-bf16", "avx512-vnni", "avx2-vnni", "avx2")
NAMES = [
    *("int8-features", "int8-32x128", "int8-lengths", "int8-text", "bf16"),
    *(f"int8-{isa}" for isa in OTHERS),
    *(f"drift-{precision}-{isa}" for precision in ("int8", "bf16") for isa in ("amx", *OTHERS)),
]


def plan(able: Abilities, **options: object) -> dict[str, Step]:
    asked = CpuOptions(out=Path("out"), **{"threads": 1, **options})
    return {step.name: step for step in planned(asked, able, lengths="lengths-of-x")}


def test_a_processor_that_has_everything(abilities: Callable[..., Abilities]) -> None:
    steps = plan(abilities())
    assert list(steps) == NAMES
    assert not any(step.problem or step.left_out for step in steps.values())
    commands = {name: step.command for name, step in steps.items()}
    assert {name: commands[name] for name in NAMES[:9]} == {
        "int8-features": "bertrt bench bert-base-cased-int8 --threads 1 --batch 1,8 --sequence 16,128 --seconds 2 "
        "--against torch,onnxruntime,openvino --json -",
        "int8-32x128": "bertrt bench bert-base-cased-int8 --threads 1 --batch 32 --sequence 128 --repeats 5 "
        "--against torch,onnxruntime,openvino --json -",
        "int8-lengths": "bertrt bench bert-base-cased-int8 --threads 1 --lengths-from lengths-of-x --repeats 3 "
        "--rounds 3 --warmup 1 --against onnxruntime,openvino --json -",
        "int8-text": "bertrt bench bert-base-cased-int8 --threads 1 --batch 1 --sequence 128 "
        "--task features,fill-mask-text --seconds 2 --json -",
        "bf16": "bertrt bench bert-base-cased-bf16 --threads 1 --batch 1,32 --sequence 128 --seconds 2 "
        "--against openvino --json -",
        "int8-avx512-bf16": "BERTRT_ISA=avx512-bf16 bertrt bench bert-base-cased-int8 --threads 1 --batch 1,8 "
        "--sequence 128 --seconds 2 --against onnxruntime --json -",
        "int8-avx512-vnni": "BERTRT_ISA=avx512-vnni bertrt bench bert-base-cased-int8 --threads 1 --batch 1,8 "
        "--sequence 128 --seconds 2 --against onnxruntime --json -",
        "int8-avx2-vnni": "BERTRT_ISA=avx2-vnni bertrt bench bert-base-cased-int8 --threads 1 --batch 1 "
        "--sequence 128 --seconds 2 --against torch --json -",
        "int8-avx2": "BERTRT_ISA=avx2 bertrt bench bert-base-cased-int8 --threads 1 --batch 1 --sequence 128 "
        "--seconds 2 --against torch --json -",
    }
    assert commands["drift-bf16-amx"] == (
        "BERTRT_ISA=amx bertrt drift demo-bf16 --threads 1 --json --no-save"
    )


def test_the_commands_understand_what_they_are_told(abilities: Callable[..., Abilities]) -> None:
    commands = {command.name: command for command in (bench.COMMAND, drift.COMMAND, export.COMMAND)}
    for step in plan(abilities(), seconds=0.5).values():
        for name, *arguments in (step.arguments, step.engine.arguments):
            parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
            commands[name].add_arguments(parser)
            if name != "bench":
                parser.add_argument("--json", action="store_true")
            parsed = parser.parse_args(arguments)
            if name == "bench":
                assert bench._options(parsed).case_count > 0


def test_a_processor_without_amx(abilities: Callable[..., Abilities]) -> None:
    steps = plan(abilities("amx", "avx2-vnni"))
    assert list(steps) == NAMES
    assert {name: step.problem for name, step in steps.items() if step.problem} == {
        "int8-avx512-bf16": "it is the best instruction set here, with which int8-features was measured",
        "int8-avx2-vnni": "no avx2-vnni",
        **{
            f"drift-{precision}-{isa}": f"no {isa}"
            for precision in ("int8", "bf16")
            for isa in ("amx", "avx2-vnni")
        },
    }


def test_a_processor_of_another_kind(abilities: Callable[..., Abilities]) -> None:
    steps = plan(abilities("amx", *OTHERS))
    assert [name for name, step in steps.items() if not step.problem] == NAMES[:5]


def test_rivals_that_are_not_there(abilities: Callable[..., Abilities]) -> None:
    steps = plan(abilities(openvino="no nncf", torch="no torch"))
    assert steps["int8-features"].rivals == ("onnxruntime",)
    assert steps["int8-features"].left_out == (("torch", "no torch"), ("openvino", "no nncf"))
    # Our own time is worth a record too.
    assert steps["bf16"].command.endswith("--batch 1,32 --sequence 128 --seconds 2 --json -")
    assert steps["bf16"].problem == ""
    assert {step.problem for step in steps.values() if step.kind == "drift"} == {"no torch"}


def test_the_demo_model(abilities: Callable[..., Abilities]) -> None:
    steps = plan(abilities(), model="demo")
    assert steps["int8-text"].engine == steps["drift-int8-avx2"].engine
    assert " ".join(steps["bf16"].engine.arguments) == (
        "export demo demo-bf16 --precision bf16 --backend native"
    )
    random = plan(abilities())["bf16"].engine.arguments
    assert " ".join(random) == (
        "export bert-base-cased bert-base-cased-bf16 --random --precision bf16 --backend native"
    )


def test_some_of_the_steps(abilities: Callable[..., Abilities]) -> None:
    steps = list(plan(abilities()).values())
    assert chosen(steps, ()) == steps
    assert [step.name for step in chosen(steps, ("lengths", "int8-avx2"))] == [
        *("int8-lengths", "int8-avx2-vnni", "int8-avx2", "drift-int8-avx2-vnni", "drift-int8-avx2")
    ]
    with pytest.raises(InputError, match="no step's name holds abacus; there are int8-features, int8-32x128"):
        chosen(steps, ("abacus",))


def test_a_command_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.touch()
    assert CpuOptions(out=tmp_path).command == "python -m bertrt_bench.cpu --out DIR"
    options = CpuOptions(
        out=tmp_path, model="demo", threads=1, seconds=0.5, only=("text", "bf16"), lengths_from=text
    )
    assert options.command == (
        "python -m bertrt_bench.cpu --out DIR --model demo --threads 1 --seconds 0.5 --only text,bf16 "
        "--lengths-from prose.txt"
    )
