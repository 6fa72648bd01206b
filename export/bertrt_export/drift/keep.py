"""Keeping a report: in the engine's folder, with a summary in its manifest, or in a folder of its own."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Final

from bertrt.errors import EngineFolderError
from bertrt.folder import EngineFolder, write_file
from bertrt_export.drift.report import DriftReport

JSON_NAME: Final = "drift.json"
MARKDOWN_NAME: Final = "drift.md"
HTML_NAME: Final = "drift.html"


def check_writable(path: Path) -> None:
    """Make sure that a report can be kept in a folder, or in one yet to be made, before the long work begins.

    Raises:
        EngineFolderError: it cannot.
    """
    absolute = path.absolute()
    there = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    probe = there / f".drift.{secrets.token_hex(6)}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def keep_in_engine(folder: EngineFolder, report: DriftReport) -> EngineFolder:
    """Put the report's three files into the engine's folder, and its summary into the manifest.

    The manifest loses its old summary first and gets the new one last, so that at every moment a summary is
    that of the files beside it, wherever the work may be interrupted.

    Raises:
        EngineFolderError: the folder cannot be written, or holds another engine by now.
    """
    files = _render(report)
    # The engine may have been exported again during the measurement: the report is then not this one's.
    there = EngineFolder.open(folder.path, verify=False)
    if there.manifest.files != folder.manifest.files:
        raise EngineFolderError(
            f"the engine {str(folder.path)!r} was replaced while it was measured; run drift again"
        )
    folder = there
    try:
        if folder.manifest.drift is not None:
            folder = folder.replace_manifest(folder.manifest.with_drift(None))
        _write(folder.path, files)
        return folder.replace_manifest(folder.manifest.with_drift(report.summary()))
    except OSError as error:
        raise _cannot_write(folder.path, error) from error


def keep_in_folder(path: Path, report: DriftReport) -> None:
    """Put the report's three files into a folder, made if need be; the engine stays as it is.

    Raises:
        EngineFolderError: the folder cannot be written.
    """
    files = _render(report)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write(path, files)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _render(report: DriftReport) -> dict[str, bytes]:
    """All three files, before the first is written: an error on the way leaves the old ones."""
    value = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    texts = {
        JSON_NAME: value + "\n",
        MARKDOWN_NAME: report.to_markdown(),
        HTML_NAME: report.to_html(),
    }
    return {name: text.encode() for name, text in texts.items()}


def _write(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        write_file(path / name, data)


def _cannot_write(path: Path, error: OSError) -> EngineFolderError:
    return EngineFolderError(
        f"cannot keep the drift report in {str(path)!r}: {error.strerror or error}; pass --out-dir to keep "
        "it elsewhere, or --no-save to print it only"
    )
