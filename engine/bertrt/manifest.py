"""``engine.json``: the manifest of an engine folder, its fields and their checks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from bertrt.architecture import BertArchitecture
from bertrt.errors import ManifestError, UnsafePathError, UnsupportedVersionError
from bertrt.plans import BUILT_BACKEND, Plan

FORMAT = "bertrt-engine"
FORMAT_VERSION = 1

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Target = Literal["cpu", "tensorrt"]
Dialect = Literal["ort", "onnx"]
SourceKind = Literal["demo", "folder", "hub", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where an engine's weights came from.

    Attributes:
        kind: ``demo`` (embedded), ``folder`` (local), ``hub`` (downloaded) or ``random`` (seeded noise in the
            shape of a real model: its speed means something, its answers do not).
        name: the checkpoint's name; of a local folder its last component, so that no path of the exporting
            machine travels with the engine.
        revision: the hub's commit, where there is one.
        weights_sha256: over the weight files, in hexadecimal; ``None`` for ``random``.
        seed: of ``random``, else ``None``.
    """

    kind: SourceKind
    name: str
    revision: str | None = None
    weights_sha256: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Which heads a checkpoint has."""

    mlm: bool
    nsp: bool
    pooler: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file of the folder."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known about an engine.

    Attributes:
        source: where the weights came from.
        architecture: the model's dimensions.
        precision: of the matrix products.
        dialect: of the graphs: ``ort`` (ONNX Runtime's fused operators) or ``onnx`` (standard operators only);
            ``None`` in a folder without graphs.
        heads: which heads there are.
        target: what the folder is made for: ``cpu``, or ``tensorrt``, whose graphs say the type of every value and
            come in parts (see `bertrt.backends.parts`).
        backends: for each backend the files that it reads, by role; none for ``tensorrt`` before its plan is built.
        files: every file of the folder but ``engine.json`` itself and the drift reports.
        graph: what the builder counted: fused nodes, quantised products; empty in a folder without graphs.
        versions: of the packages that built the folder.
        drift: the summary of the last drift measurement, or ``None``.
        calibration: how the scales of the activations were found, and the scales, or ``None`` where there are none.
        plan: what is known about the TensorRT plan, or ``None`` before it is built.
    """

    source: Source
    architecture: BertArchitecture
    precision: Precision
    dialect: Dialect | None
    heads: Heads
    backends: Mapping[str, Mapping[str, str]]
    files: Mapping[str, FileRecord]
    target: Target = "cpu"
    graph: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    drift: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    plan: Plan | None = None

    @property
    def latency_only(self) -> bool:
        """Whether the weights are random, so that the answers mean nothing."""
        return self.source.kind == "random"

    def with_drift(self, drift: Mapping[str, Any] | None) -> Manifest:
        """The same manifest with another drift summary."""
        return replace(self, drift=drift)

    def without_plan(self) -> Manifest:
        """The same manifest before a plan was built: without its files, and the drift that was measured of it."""
        backends = dict(self.backends)
        old = frozenset(backends.get(BUILT_BACKEND, {}).values())
        if BUILT_BACKEND in backends:
            backends[BUILT_BACKEND] = {}
        used = {name for roles in backends.values() for name in roles.values()}
        drift = self.drift
        return replace(
            self,
            backends=backends,
            files={name: record for name, record in self.files.items() if name not in old - used},
            plan=None,
            drift=None if drift is not None and drift.get("backend") == BUILT_BACKEND else drift,
        )

    def to_json(self) -> str:
        """The text of ``engine.json``."""
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "latency_only": self.latency_only,
            "source": {name: getattr(self.source, name) for name in Source.__slots__},
            "architecture": self.architecture.to_json(),
            "target": self.target,
            "precision": self.precision,
            "dialect": self.dialect,
            "heads": {name: getattr(self.heads, name) for name in Heads.__slots__},
            "backends": {name: dict(files) for name, files in self.backends.items()},
            "files": {
                name: {"size": record.size, "sha256": record.sha256}
                for name, record in sorted(self.files.items())
            },
            "graph": dict(self.graph),
            "versions": dict(self.versions),
            "drift": self.drift,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "plan": self.plan.to_json() if self.plan else None,
        }
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, plans: bool = True) -> Manifest:
        """Read and check ``engine.json``.

        Args:
            text: its text.
            plans: whether the plan matters. Otherwise one about which anything is wrong is as good as none.

        Raises:
            ManifestError: not JSON, or a field is missing or of the wrong type.
            UnsupportedVersionError: another format version.
            UnsafePathError: a file's path would leave the folder.
        """
        try:
            value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
            # Escapes may hold half a surrogate pair, which can neither be printed nor name a file.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"engine.json is not JSON ({error}); export the engine again") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ManifestError(
                f"engine.json does not say format={FORMAT!r}: this is not an engine folder; make one with "
                "'bertrt export SOURCE OUT'"
            )
        version = value.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:  # True and 1.0 equal 1
            hint = "update bertrt" if type(version) is int and version > FORMAT_VERSION else "export it again"
            raise UnsupportedVersionError(
                f"the engine has format version {version!r}, this release reads {FORMAT_VERSION}; {hint}"
            )
        files = {
            safe_name(name): FileRecord(
                size=_size(record, f"files[{name!r}]"),
                sha256=_get(record, "sha256", str, f"files[{name!r}]"),
            )
            for name, record in _get(value, "files", dict).items()
        }
        backends: dict[str, dict[str, str]] = {}
        for backend, roles in _get(value, "backends", dict).items():
            backends[backend] = {}
            if not isinstance(roles, dict):
                if backend == BUILT_BACKEND and not plans:
                    continue
                raise _wrong_type(f"backends.{backend}", dict, roles)
            for role in roles:
                name = safe_name(_get(roles, role, str, f"backends[{backend!r}]"))
                if name not in files:
                    raise ManifestError(
                        f"engine.json: backend {backend!r} needs {name!r}, which is not among 'files'; export the "
                        "engine again"
                    )
                backends[backend][role] = name
        source, heads = _get(value, "source", dict), _get(value, "heads", dict)
        plan, usable = None, True
        try:
            plan = None if value.get("plan") is None else Plan.from_json(value["plan"])
        except ManifestError:
            if plans:
                raise
            usable = False
        manifest = cls(
            source=Source(
                kind=_choice(source, "kind", get_args(SourceKind), "source"),
                name=_get(source, "name", str, "source"),
                revision=_optional(source, "revision", str, "source"),
                weights_sha256=_optional(source, "weights_sha256", str, "source"),
                seed=_optional(source, "seed", int, "source"),
            ),
            architecture=BertArchitecture.from_json(value.get("architecture")),
            precision=_choice(value, "precision", get_args(Precision)),
            dialect=None
            if value.get("dialect", "") is None
            else _choice(value, "dialect", get_args(Dialect)),
            # Folders of releases that knew no other target do not name it.
            target=_choice(value, "target", get_args(Target)) if "target" in value else "cpu",
            heads=Heads(**{name: _get(heads, name, bool, "heads") for name in Heads.__slots__}),
            backends=backends,
            files=files,
            graph=_get(value, "graph", dict),
            versions=_get(value, "versions", dict),
            drift=_optional(value, "drift", dict),
            calibration=_optional(value, "calibration", dict),
            plan=plan,
        )
        return manifest if usable else manifest.without_plan()


def safe_name(name: str) -> str:
    """Return the name of a file inside the folder.

    Raises:
        UnsafePathError: absolute, empty, with a backslash, a drive or NUL, or with a ``..`` component.
    """
    path = PurePosixPath(name)
    if (
        not name
        or path.is_absolute()
        or any(character in name for character in "\\:\0")
        or any(part in {"..", "."} for part in name.split("/"))
        or path.as_posix() != name
    ):
        raise UnsafePathError(
            f"engine.json names the file {name!r}; a file must lie inside the engine folder. "
            "Do not use this folder: it was not written by bertrt."
        )
    return name


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _get(value: object, name: str, kind: type, where: str = "") -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        place = f"{where}.{name}" if where else name
        raise _wrong_type(place, kind, found)
    return found


def _wrong_type(place: str, kind: type, found: object) -> ManifestError:
    return ManifestError(
        f"engine.json: {place!r} must be of type {kind.__name__}, got {type(found).__name__}; export the engine again"
    )


def _size(record: object, where: str) -> int:
    size: int = _get(record, "size", int, where)
    if size < 0:
        raise ManifestError(
            f"engine.json: '{where}.size' must be 0 bytes or more, got {size}; export the engine again"
        )
    return size


def _optional(value: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    return None if value.get(name) is None else _get(value, name, kind, where)


def _choice(value: Mapping[str, Any], name: str, choices: tuple[str, ...], where: str = "") -> Any:
    found = _get(value, name, str, where)
    if found not in choices:
        place = f"{where}.{name}" if where else name
        raise ManifestError(
            f"engine.json: {place!r} must be one of {', '.join(choices)}, got {found!r}; update bertrt, or export the "
            "engine again"
        )
    return found
