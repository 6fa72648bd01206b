"""The time of a run, and the shares of its steps."""

from __future__ import annotations

from bertrt_bench.gpu.clock import LEAST, Clock


class Time:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_a_share_is_no_longer_than_asked_nor_than_what_is_left() -> None:
    time = Time()
    clock = Clock(seconds=100, now=time)
    time.seconds += 10
    assert (clock.spent, clock.left) == (10, 90)
    assert clock.share(30).left == 30
    assert clock.share(300).left == 90
    assert clock.share(300, kept=50).left == 40
    share = clock.share(30)
    time.seconds += 31
    assert share.left == -1


def test_a_step_does_not_begin_for_a_moment() -> None:
    time = Time()
    clock = Clock(seconds=100, now=time)
    time.seconds += 100 - LEAST
    assert clock.share(60).left == LEAST
    assert clock.share(60, kept=1) is None
    time.seconds += 1
    assert clock.share(60) is None
    time.seconds += 60
    assert clock.left < 0
    assert clock.share(60) is None


def test_what_to_do_depends_on_which_limit_was_met() -> None:
    clock = Clock(seconds=100, now=Time())
    own, rest = clock.share(60), clock.share(300)
    assert (own.own, rest.own, clock.share(60, kept=40).own) == (True, False, False)
    assert own.advice.startswith(
        "its step may take no longer; give --minutes more than before, and more than 9.5"
    )
    assert rest.advice == "the time of the run is used up; raise --minutes, or name fewer steps with --only"
    assert own.with_grace(10).advice == own.advice


def test_grace_ends_with_the_run_less_what_is_kept() -> None:
    clock = Clock(seconds=100, now=Time())
    share = clock.share(60, kept=20)
    assert share.with_grace(15).left == 75
    assert share.with_grace(60).left == 80
    assert share.left == 60
