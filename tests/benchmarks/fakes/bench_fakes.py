"""Contestants for the tests: each answers at once, and misbehaves in its own way. Imported by worker processes only."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

VOCAB, HIDDEN, TOP_K = 8192, 256, 5


class Fake:
    """Answers what follows from the question alone, so that two of them agree; keeps a log of its runs."""

    def __init__(self, setup, name):
        self.versions = {"fake": "1.0"}
        self.name = name
        self.threads = setup.threads
        self.details = {"omp": os.environ["OMP_NUM_THREADS"], "setup_threads": str(setup.threads)}
        self.log("open")

    def log(self, event):
        if path := os.environ.get("BENCH_FAKES_LOG"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(f"{self.name} {event} {os.getpid()} {time.monotonic_ns()}\n")

    def answer(self, question):
        case = question.case
        random = np.random.default_rng(int(question.tokens.input_ids.sum()))
        if case.task == "features":
            return {"hidden_states": random.normal(size=(case.tokens, HIDDEN)).astype(np.float32)}
        if case.task == "next-sentence":
            return {"logits": random.normal(size=(case.batch, 2)).astype(np.float32)}
        if case.task == "mlm-all":
            return {"logits": random.normal(size=(case.tokens, VOCAB)).astype(np.float32)}
        log_probs = random.normal(size=(case.batch, VOCAB)).astype(np.float32)
        ids = np.argsort(-log_probs, axis=1)[:, :TOP_K]
        return {
            "ids": ids,
            "log_probs": np.take_along_axis(log_probs, ids, axis=1),
            "all_log_probs": log_probs,
        }

    def prepare(self, question):
        answer = self.answer(question)
        self.log(f"ids:{question.tokens.input_ids.sum()}")

        def run():
            self.log(f"run:{question.case.task}:{question.case.batch}:{question.case.sequence}")
            time.sleep(1e-4)
            self.log("end")
            return answer

        return run


class Peaked(Fake):
    def peak(self):
        self.log("peak")
        return 1e9


class Wrong(Fake):
    def answer(self, question):
        return {name: array[..., ::-1] for name, array in super().answer(question).items()}


class NotFinite(Fake):
    def answer(self, question):
        answer = super().answer(question)
        answer["hidden_states"][0, 0] = np.nan
        return answer


class Misshapen(Fake):
    def answer(self, question):
        return {name: array[:-1] for name, array in super().answer(question).items()}


class Chatty(Fake):
    def prepare(self, question):
        print("hello from Python")
        os.write(1, b"hello from a library\n" * 20_000)
        return super().prepare(question)


class Misbehaving(Fake):
    """Answers the first run, the check, and no other."""

    def prepare(self, question):
        answer, runs = self.answer(question), []

        def run():
            runs.append(None)
            if len(runs) > 1:
                self.misbehave()
            return answer

        return run


class Dies(Misbehaving):
    def misbehave(self):
        sys.stderr.write("first words\nlast words of a fake\n")
        sys.stderr.flush()
        os._exit(7)


class Killed(Misbehaving):
    def misbehave(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Orphans(Misbehaving):
    """Starts a process that outlives it, and dies."""

    def misbehave(self):
        child = subprocess.Popen(["sleep", "600"])
        with Path(os.environ["BENCH_FAKES_LOG"]).open("a", encoding="utf-8") as file:
            file.write(f"orphan start {child.pid} {time.monotonic_ns()}\n")
        os.kill(os.getpid(), signal.SIGKILL)


class Late(Misbehaving):
    """Answers the second run much later than the others."""

    def misbehave(self):
        time.sleep(3)


class Raises(Misbehaving):
    def misbehave(self):
        raise RuntimeError("out of paper")


class Garbles(Misbehaving):
    def misbehave(self):
        # Every descriptor that could be the protocol's.
        for descriptor in range(3, 12):
            try:
                os.write(descriptor, b"no JSON\n")
            except OSError:
                continue


def hangs_at_the_start(setup):
    Fake(setup, "hangs")
    threading.Event().wait()


def _factory(name, kind):
    def open_fake(setup):
        return kind(setup, name)

    return open_fake


open_a = _factory("a", Fake)
open_b = _factory("b", Fake)
open_c = _factory("c", Fake)
open_peaked = _factory("peaked", Peaked)
open_wrong = _factory("wrong", Wrong)
open_not_finite = _factory("not_finite", NotFinite)
open_misshapen = _factory("misshapen", Misshapen)
open_chatty = _factory("chatty", Chatty)
open_dies = _factory("dies", Dies)
open_killed = _factory("killed", Killed)
open_orphans = _factory("orphans", Orphans)
open_late = _factory("late", Late)
open_raises = _factory("raises", Raises)
open_garbles = _factory("garbles", Garbles)
no_function = 3
