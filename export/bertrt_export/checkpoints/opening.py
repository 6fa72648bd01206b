"""From what a user calls a checkpoint to an open one."""

from __future__ import annotations

import os
from pathlib import Path

from bertrt.architecture import BertArchitecture
from bertrt.errors import CheckpointNotFoundError, InputError
from bertrt.manifest import Source, SourceKind
from bertrt.tokenization import WordPieceTokenizer
from bertrt_export.checkpoints.checkpoint import Checkpoint
from bertrt_export.checkpoints.config import read_config
from bertrt_export.checkpoints.hub import download, is_hub_name
from bertrt_export.checkpoints.random_weights import RandomWeights, random_model
from bertrt_export.checkpoints.weights import open_weights
from bertrt_export.demo import demo_folder

DEMO = "demo"


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    random: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """Open a checkpoint.

    A local folder that exists wins; then ``demo``, the checkpoint that is built in; then a name on the hub
    (``model`` or ``owner/model``). A folder named ``demo`` wins only if it is a checkpoint: it has a
    ``config.json``, and no ``engine.json`` as the engine of that name has. A name that starts with ``.``,
    ``/`` or ``~``, or has more than one ``/``, is never looked for on the hub; nor is what is not a `str`.

    Args:
        source: a folder of Hugging Face files, ``demo``, a name on the hub, or with ``random`` one of
            `RANDOM_MODELS`.
        revision: a branch, tag or commit on the hub; ``None`` for its main branch.
        random: make seeded random weights in the shape of the model named, which need no network: its speed
            means something, its answers do not.
        seed: of the random weights, from 0 to 2^63 - 1.

    Raises:
        CheckpointNotFoundError: no such folder or model, or one without the files of a checkpoint.
        DownloadError: the hub cannot be reached, or does not have the model.
        UnsupportedModelError: not BERT, or a BERT with a part that is not implemented.
        CorruptCheckpointError: a file cannot be parsed.
        UnsafePathError: an index of weight files names one outside the folder.
        MissingTensorError, UnexpectedTensorError, TensorShapeError, TokenizerError: see `Checkpoint`.
        InputError: a revision of something that is not on the hub, or a seed out of range.
    """
    if random:
        if revision is not None:
            raise InputError(f"random weights have no revision, got {revision!r}; leave it out")
        return _open_random(os.fspath(source), seed)
    folder = Path(source)
    if _is_folder(source):
        kind: SourceKind = "folder"
        # A file name may be any bytes, the engine's manifest is UTF-8.
        name = folder.resolve().name.encode("utf-8", "replace").decode()
    elif source == DEMO:
        kind, name, folder = "demo", DEMO, demo_folder()
    else:
        kind, name = "hub", _hub_name(source)
    commit = None
    if kind == "hub":
        folder, commit = download(name, revision)
    elif revision is not None:
        raise InputError(
            f"{os.fspath(source)!r} is not on the hub, so it has no revision {revision!r}; leave it out"
        )
    return _open_folder(folder, kind, name, commit)


def reopen(source: Source, given: str | None) -> Checkpoint:
    """Open the checkpoint that an engine was made from.

    The demo checkpoint is at hand, random weights are drawn again from their seed, and a model of the hub has
    a name and a commit, whatever lies in the current folder; of an engine that was made from a local folder
    the user says where that folder is.

    Args:
        source: the engine's, from its manifest.
        given: what the user calls the checkpoint, see `open_checkpoint`; ``None`` to go by ``source``.

    Raises:
        InputError: nothing is given, and the engine knows only the name of a folder; or a checkpoint is
            given for an engine with random weights.
        CheckpointError: it cannot be opened; see `open_checkpoint`.
    """
    if source.kind == "random":
        if given is not None:
            raise InputError(
                "the engine has random weights, which are drawn again from their seed; leave out --reference"
            )
        return _open_random(source.name, source.seed or 0)
    if given is not None:
        return open_checkpoint(given)
    match source.kind:
        case "demo":
            return _open_folder(demo_folder(), "demo", DEMO, None)
        case "hub":
            if not is_hub_name(source.name):
                raise CheckpointNotFoundError(
                    f"the engine says that it was made from {source.name!r} on the hub, and that is no model "
                    "name there; pass --reference"
                )
            folder, commit = download(source.name, source.revision)
            return _open_folder(folder, "hub", source.name, commit)
        case _:
            raise InputError(
                f"the engine was exported from a local folder named {source.name!r}, and keeps only its name; "
                "pass --reference FOLDER"
            )


def _is_folder(source: str | os.PathLike[str]) -> bool:
    # An empty path would be the current folder.
    if not os.fspath(source):
        return False
    folder = Path(source)
    try:
        if source == DEMO:
            return (folder / "config.json").is_file() and not (folder / "engine.json").exists()
        return folder.is_dir()
    except OSError as error:
        raise CheckpointNotFoundError(
            f"cannot look for a checkpoint folder at {os.fspath(source)!r}: {error.strerror}; check the path"
        ) from error


def _open_random(name: str, seed: int) -> Checkpoint:
    architecture, tokenizer = random_model(name)
    return Checkpoint(
        RandomWeights(architecture, seed),
        architecture=architecture,
        config={},
        source=Source(kind="random", name=name, seed=seed),
        tokenizer=tokenizer,
        folder=None,
    )


def _open_folder(folder: Path, kind: SourceKind, name: str, commit: str | None) -> Checkpoint:
    config = read_config(folder)
    architecture = BertArchitecture.from_config(config)
    store, sha256 = open_weights(folder)
    try:
        return Checkpoint(
            store,
            architecture=architecture,
            config=config,
            source=Source(kind=kind, name=name, revision=commit, weights_sha256=sha256),
            tokenizer=WordPieceTokenizer.from_folder(folder),
            folder=folder,
        )
    except BaseException:
        store.close()
        raise


def _hub_name(source: str | os.PathLike[str]) -> str:
    name = os.fspath(source)
    if name and Path(source).exists():
        raise CheckpointNotFoundError(
            f"{name!r} is a file; a checkpoint is a folder with config.json, weights and tokenizer files: "
            "give the folder"
        )
    if not isinstance(source, str) or not is_hub_name(name):
        raise CheckpointNotFoundError(
            f"there is no checkpoint folder {name!r}, and it is no model name on the hub; "
            "check the path, or give 'demo', which is built in"
        )
    return name
