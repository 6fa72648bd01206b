"""Profiles and what a folder knows about its plan."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from bertrt.errors import InputError, ManifestError
from bertrt.plans import Plan, Profile, parse_compute_capability


def test_a_profile_is_what_is_written() -> None:
    profile = Profile.parse("1x64..8x128..32x512")
    assert (profile.least, profile.best, profile.most) == ((1, 64), (8, 128), (32, 512))
    assert Profile.parse(str(profile)) == profile
    assert Profile.parse(" 1x16..1x64 ") == Profile((1, 16), (1, 64), (1, 64))


@pytest.mark.parametrize(
    ("shape", "held"),
    [
        ((1, 64), True),
        ((32, 512), True),
        ((8, 65), True),
        ((33, 64), False),
        ((1, 63), False),
        ((1, 513), False),
    ],
)
def test_a_profile_holds_what_lies_between(shape: tuple[int, int], held: bool) -> None:
    assert Profile.parse("1x64..8x128..32x512").holds(shape) is held


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1x16",
        "1x16..",
        "1x16..2x32..3x64..4x128",
        "0x16..1x64",
        "1x16-1x64",
        "ax16..1x64",
        "1x1..1x99999999",
        "١x1..1x2",
    ],
)
def test_what_is_no_profile(text: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(repr(text))} is no profile; write sequences x tokens"):
        Profile.parse(text)


@pytest.mark.parametrize("text", ["2x16..1x64", "1x64..1x16", "1x16..8x8..8x64", "1x16..9x64..8x64"])
def test_a_profile_that_does_not_rise(text: str) -> None:
    with pytest.raises(InputError, match="does not rise"):
        Profile.parse(text)


@pytest.mark.parametrize("text", ["8.9", "12.0", "7.5"])
def test_compute_capabilities(text: str) -> None:
    assert parse_compute_capability(text) == text


@pytest.mark.parametrize("text", ["", "8", "89", "8.", "8.90", "sm89", "08.9", "8.9 "])
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(
        InputError, match=f"^{re.escape(repr(text))} is no compute capability; write one such as 8.9$"
    ):
        parse_compute_capability(text)


@pytest.fixture
def plan() -> Plan:
    return Plan(
        library="tensorrt_rtx",
        version="1.7.1",
        compute_capabilities=("8.9", "12.0"),
        profiles=(
            Profile.parse("1x16..1x64"),
            Profile.parse("1x64..8x128..32x512"),
            Profile.parse("1x1..64x64"),
        ),
        mlm_rows=1024,
        seconds=1.5,
        report={"encoder": {"layers": 3}},
    )


def test_a_plan_survives_the_manifest(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    tried = replace(plan, device="NVIDIA L4")
    assert Plan.from_json(tried.to_json()) == tried


def test_a_plan_of_a_release_that_did_not_say_on_which_gpu_it_was_built(plan: Plan) -> None:
    written = plan.to_json()
    del written["device"]
    assert Plan.from_json(written) == plan


def test_the_largest_block_of_a_plan(plan: Plan) -> None:
    assert (plan.most_tokens, plan.most_sequences) == (32 * 512, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"library": None},
        {"version": 1},
        {"compute_capabilities": []},
        {"compute_capabilities": [8.9]},
        {"profiles": "1x1..1x2"},
        {"mlm_rows": -1},
        {"mlm_rows": True},
        {"seconds": "1"},
        {"report": []},
        {"device": 4},
    ],
)
def test_a_plan_with_a_field_of_the_wrong_type(plan: Plan, change: dict[str, Any]) -> None:
    with pytest.raises(
        ManifestError, match="'plan' lacks a field or has one of the wrong type; build it again"
    ):
        Plan.from_json({**plan.to_json(), **change})


def test_a_plan_that_is_no_object_or_has_no_such_profile(plan: Plan) -> None:
    with pytest.raises(ManifestError, match="'plan' lacks a field"):
        Plan.from_json([])
    with pytest.raises(ManifestError, match="'plan': '1x1' is no profile"):
        Plan.from_json({**plan.to_json(), "profiles": ["1x1"]})
