"""The checkpoint that an engine was made from is found again, whatever lies in the current folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers

from bertrt.errors import CheckpointNotFoundError, InputError
from bertrt.manifest import Source
from bertrt_export.checkpoints import open_checkpoint, opening, reopen
from bertrt_export.demo import demo_folder

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def other(
    small_bert: Callable[..., transformers.BertForPreTraining], save_checkpoint: Callable[..., Path]
) -> Path:
    return save_checkpoint(small_bert())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("inside", [(), ("engine.json",), ("config.json", "engine.json"), ("notes.txt",)])
def test_a_folder_that_is_no_checkpoint_does_not_hide_the_demo(inside: tuple[str, ...], here: Path) -> None:
    (here / "demo").mkdir()
    for name in inside:
        (here / "demo" / name).write_text("{}")
    with open_checkpoint("demo") as checkpoint:
        assert (checkpoint.source.kind, checkpoint.folder) == ("demo", demo_folder())
        source = checkpoint.source
    for given in (None, "demo"):
        with reopen(source, given) as checkpoint:
            assert checkpoint.source == source


def test_a_checkpoint_named_demo_is_what_a_user_means_and_not_what_an_engine_says(
    other: Path, here: Path
) -> None:
    with open_checkpoint("demo") as checkpoint:
        source = checkpoint.source
    shutil.copytree(other, here / "demo")
    with open_checkpoint("demo") as checkpoint:
        assert (checkpoint.source.kind, checkpoint.source.name) == ("folder", "demo")
    with reopen(source, None) as checkpoint:
        assert checkpoint.source == source


def test_an_engine_of_the_hub(other: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, revision: str | None) -> tuple[Path, str]:
        asked.append((name, revision))
        return other, COMMIT

    monkeypatch.setattr(opening, "download", download)
    (here / "owner/model").mkdir(parents=True)
    with reopen(Source(kind="hub", name="owner/model", revision=COMMIT), None) as checkpoint:
        assert checkpoint.source.kind == "hub"
        assert checkpoint.source.revision == COMMIT
    assert asked == [("owner/model", COMMIT)]
    with pytest.raises(CheckpointNotFoundError, match=r"'\.\./x' on the hub.* pass --reference"):
        reopen(Source(kind="hub", name="../x", revision=COMMIT), None)
    assert len(asked) == 1


def test_an_engine_of_random_weights() -> None:
    source = Source(kind="random", name="bert-base-cased", seed=3)
    name = "encoder.layer.1.attention.self.key.weight"
    with (
        reopen(source, None) as checkpoint,
        open_checkpoint("bert-base-cased", random=True, seed=3) as expected,
    ):
        assert checkpoint.source == source
        np.testing.assert_array_equal(checkpoint.tensor(name), expected.tensor(name))
    with pytest.raises(InputError, match="drawn again from their seed; leave out --reference"):
        reopen(source, "demo")


def test_an_engine_of_a_folder(other: Path) -> None:
    source = Source(kind="folder", name=other.name)
    with pytest.raises(InputError, match=r"from a local folder named .* pass --reference FOLDER"):
        reopen(source, None)
    with reopen(source, str(other)) as checkpoint:
        assert checkpoint.folder == other


def test_name_of_a_folder_that_is_not_utf8(other: Path, tmp_path: Path) -> None:
    # An engine's manifest is UTF-8, and holds the name.
    folder = shutil.copytree(other, tmp_path / os.fsdecode(b"x\xff"))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.source.name == "x?"
