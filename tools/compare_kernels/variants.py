"""What is compared: sources of some revision, with some constants set to other values."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bertrt.errors import InputError

WORKING_TREE: Final = "."
# The version is read from the project's file.
_PROJECT: Final = "pyproject.toml"
_KERNELS: Final = "kernels"
_SETTING: Final = re.compile(r"(?:(\w+)::)?(\w+)=([^,]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One build.

    Attributes:
        name: as it was written.
        revision: of git; `WORKING_TREE` for the files as they lie here.
        constants: the value of each constant that is changed, by ``NAME`` or ``STRUCT::NAME``.
    """

    name: str
    revision: str
    constants: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``REVISION`` or ``REVISION:NAME=VALUE[,NAME=VALUE]``.

        Raises:
            InputError: it is neither.
        """
        revision, colon, settings = text.partition(":")
        constants: dict[str, str] = {}
        for setting in settings.split(",") if colon else ():
            found = _SETTING.fullmatch(setting)
            if found is None:
                raise InputError(f"{setting!r} of variant {text!r} is not NAME=VALUE or STRUCT::NAME=VALUE")
            struct, name, value = found.groups()
            constants[f"{struct}::{name}" if struct else name] = value
        # An option of git would begin with a dash.
        if not revision or revision.startswith("-"):
            raise InputError(f"variant {text!r} has no revision before the colon; the working tree is '.'")
        return cls(name=text, revision=revision, constants=constants)

    @property
    def folder(self) -> str:
        """A name for its folder, different for different variants."""
        return re.sub(r"[^\w.=-]", "_", self.name.replace("::", "-")) or "_"


def write_sources(variant: Variant, repository: Path, folder: Path) -> None:
    """Put a variant's sources into a folder; files that are there already with the same content stay as they are.

    Raises:
        InputError: there is no such revision or constant.
        OSError: the folder cannot be written.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    if variant.revision == WORKING_TREE:
        shutil.copytree(repository / _KERNELS, fresh / _KERNELS)
        shutil.copy(repository / _PROJECT, fresh / _PROJECT)
    else:
        _extract(variant.revision, repository, fresh)
    for constant, value in variant.constants.items():
        _set_constant(fresh / _KERNELS / "src", constant, value)
    # What has not changed need not be compiled again.
    for path in (path for path in fresh.rglob("*") if path.is_file()):
        known = folder / path.relative_to(fresh)
        if known.is_file() and known.read_bytes() == path.read_bytes():
            shutil.copystat(known, path)
        else:
            path.touch()
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _extract(revision: str, repository: Path, folder: Path) -> None:
    archive = folder / "sources.tar"
    command = ["git", "-C", str(repository), "archive", f"--output={archive}", revision, _KERNELS, _PROJECT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own
    if done.returncode != 0:
        raise InputError(f"git has no kernels of revision {revision!r}: {done.stderr.strip()}")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    archive.unlink()


def _set_constant(sources: Path, constant: str, value: str) -> None:
    struct, _, name = constant.rpartition("::")
    declared = re.compile(rf"(\bconstexpr\b[^;(]*\b{name} = )[^;]+;")
    scope = re.compile(rf"\b(?:struct|class) {struct}\b[^;{{]*\{{.*?^\}};", re.DOTALL | re.MULTILINE)
    places: list[tuple[Path, int, int]] = []
    for path in sorted(sources.rglob("*.[ch]*")):
        text = path.read_text(encoding="utf-8")
        regions = [(0, len(text))] if not struct else [found.span() for found in scope.finditer(text)]
        places += [
            (path, found.end(1), found.end() - 1)
            for region in regions
            for found in declared.finditer(text, *region)
        ]
    if len(places) != 1:
        where = ", ".join(path.name for path, _, _ in places) or "no file"
        raise InputError(
            f"constant {constant!r} must be defined once in the kernels' sources, as 'constexpr TYPE {name} = "
            f"VALUE;', but is in {where}; of several structs name one: STRUCT::{name}"
        )
    path, begin, end = places[0]
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:begin] + value + text[end:], encoding="utf-8")
