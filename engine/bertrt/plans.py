"""TensorRT plans: the shapes that they are built for, and what an engine folder knows about its own."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bertrt.errors import InputError, ManifestError

# The backend whose files are built of others in the folder, here or elsewhere.
BUILT_BACKEND: Final = "tensorrt"
# A shape of input ids: sequences, tokens of each.
Shape = tuple[int, int]

_SHAPE: Final = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})", re.ASCII)
_CAPABILITY: Final = re.compile(r"[1-9]\d?\.\d", re.ASCII)


@dataclass(frozen=True, slots=True)
class Profile:
    """An optimisation profile: the shapes that a plan accepts, and the one that it is tuned for.

    Attributes:
        least: the fewest sequences, and the fewest tokens of each.
        best: what the plan is tuned for.
        most: the most sequences, and the most tokens of each.

    Raises:
        InputError: the shapes do not rise from ``least`` to ``most``.
    """

    least: Shape
    best: Shape
    most: Shape

    def __post_init__(self) -> None:
        for low, middle, high in zip(self.least, self.best, self.most, strict=True):
            if not 1 <= low <= middle <= high:
                raise InputError(
                    f"the profile {self} does not rise: write the least, the best and the most, such as "
                    "1x16..8x128..32x512"
                )

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Read ``LEAST..MOST`` or ``LEAST..BEST..MOST``, each ``SEQUENCESxTOKENS``; without BEST it is MOST.

        Raises:
            InputError: not written so, or the shapes do not rise.
        """
        shapes = [_SHAPE.fullmatch(part.strip()) for part in text.split("..")]
        if len(shapes) not in {2, 3} or None in shapes:
            raise InputError(
                f"{text!r} is no profile; write sequences x tokens as LEAST..BEST..MOST, such as "
                "1x16..8x128..32x512, or LEAST..MOST"
            )
        sizes = [(int(shape[1]), int(shape[2])) for shape in shapes if shape]
        return cls(sizes[0], sizes[-2] if len(sizes) == 3 else sizes[-1], sizes[-1])

    def holds(self, shape: Shape) -> bool:
        """Whether a shape lies between ``least`` and ``most``."""
        return all(low <= size <= high for low, size, high in zip(self.least, shape, self.most, strict=True))

    def __str__(self) -> str:
        return "..".join(f"{batch}x{sequence}" for batch, sequence in (self.least, self.best, self.most))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an engine folder knows about its TensorRT plans.

    Attributes:
        library: ``tensorrt`` or ``tensorrt_rtx``, which built them and alone reads them.
        version: of the library; another one does not read them.
        compute_capabilities: the GPUs that they run on, such as ``8.9``.
        profiles: of the encoder, in the order of the plan.
        mlm_rows: the most positions of one run of the masked-LM head; 0 without the head.
        seconds: how long the build took.
        report: what the builder found, part by part.
        device: the GPU whose kernels were chosen by trying them, such as ``NVIDIA L4``; ``None`` where none was tried,
            or where a release built it that did not say.
    """

    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    mlm_rows: int
    seconds: float = 0.0
    report: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest block, padding included."""
        return max(profile.most[0] * profile.most[1] for profile in self.profiles)

    @property
    def most_sequences(self) -> int:
        """Sequences of the largest block."""
        return max(profile.most[0] for profile in self.profiles)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "library": self.library,
            "version": self.version,
            "compute_capabilities": list(self.compute_capabilities),
            "profiles": [str(profile) for profile in self.profiles],
            "mlm_rows": self.mlm_rows,
            "seconds": self.seconds,
            "report": dict(self.report),
            "device": self.device,
        }

    @classmethod
    def from_json(cls, value: object) -> Plan:
        """Read the manifest's ``plan``.

        Raises:
            ManifestError: a field is missing or of the wrong type.
        """
        fields: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
        capabilities: Any = fields.get("compute_capabilities")
        profiles: Any = fields.get("profiles")
        rows, seconds, report = fields.get("mlm_rows"), fields.get("seconds"), fields.get("report")
        device: Any = fields.get("device")
        if not (
            isinstance(fields.get("library"), str)
            and isinstance(fields.get("version"), str)
            and _strings(capabilities)
            and _strings(profiles)
            and type(rows) is int
            and rows >= 0
            and isinstance(seconds, int | float)
            and isinstance(report, Mapping)
            and isinstance(device, str | None)
        ):
            raise ManifestError(
                "engine.json: 'plan' lacks a field or has one of the wrong type; build it again with 'bertrt build "
                "FOLDER'"
            )
        try:
            shapes = tuple(map(Profile.parse, profiles))
        except InputError as error:
            raise ManifestError(
                f"engine.json: 'plan': {error}; build it again with 'bertrt build FOLDER'"
            ) from error
        return cls(
            library=fields["library"],
            version=fields["version"],
            compute_capabilities=tuple(capabilities),
            profiles=shapes,
            mlm_rows=rows,
            seconds=float(seconds),
            report=report,
            device=device,
        )


def rebuild_command(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    library: str | None = None,
    compute_capability: str | None = None,
) -> str:
    """The command that builds a plan again, with its profiles, for another library or GPU if they are given."""
    options = [f"--profile {profile}" for profile in plan.profiles]
    capabilities = (compute_capability,) if compute_capability else plan.compute_capabilities
    options += [f"--compute-capability {','.join(capabilities)}", f"--library {library or plan.library}"]
    return f"bertrt build {shlex.quote(os.fspath(path))} {' '.join(options)}"


def parse_compute_capability(text: str) -> str:
    """Check a compute capability such as ``8.9`` and return it.

    Raises:
        InputError: not written so.
    """
    if not _CAPABILITY.fullmatch(text):
        raise InputError(f"{text!r} is no compute capability; write one such as 8.9")
    return text


def _strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
