"""Where an engine computes: threads, GPUs, and ONNX Runtime's execution providers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from bertrt.errors import InputError

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: Final[tuple[str, ...]] = get_args(Provider)
# No machine of today has more processors or GPUs; a larger number is a slip, and would start as many threads.
_MOST_THREADS: Final = 4096
_MOST_DEVICES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a caller asks for; what is left open is chosen by the backend.

    Attributes:
        threads: of each run; ``None``: the CPUs that the process may use.
        provider: of ONNX Runtime; ``None``: the best that works here.
        devices: GPUs by number, one worker each; none: the first.

    Raises:
        InputError: a number out of range, a GPU named twice, an unknown provider, or GPUs for the CPU provider.
    """

    threads: int | None = None
    provider: Provider | None = None
    devices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        threads = self.threads
        if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
            raise InputError(f"threads must be a whole number from 1 to {_MOST_THREADS}, got {threads!r}")
        if self.provider is not None and self.provider not in PROVIDERS:
            raise InputError(f"provider must be one of {', '.join(PROVIDERS)}, got {self.provider!r}")
        for device in self.devices:
            if type(device) is not int or not 0 <= device < _MOST_DEVICES:
                raise InputError(
                    f"devices are the driver's numbers of GPUs, from 0 to {_MOST_DEVICES - 1}; got {device!r}"
                )
        if len(set(self.devices)) != len(self.devices):
            raise InputError(f"devices names a GPU twice: {list(self.devices)}; name each once")
        if self.provider == "cpu" and self.devices:
            raise InputError("devices are GPUs, and the provider cpu uses none; leave one of the two out")

    @classmethod
    def make(
        cls, *, threads: int | None = None, provider: str | None = None, devices: Iterable[int] | None = None
    ) -> Placement:
        """Check the arguments of `bertrt.Engine.load`.

        Raises:
            InputError: as the class; also for ``devices`` that is not a collection.
        """
        if isinstance(devices, str | bytes) or not (devices is None or isinstance(devices, Iterable)):
            raise InputError(f"devices must be a list of whole numbers such as [0, 1], got {devices!r}")
        # Checked on construction, whatever its type here.
        return cls(threads=threads, provider=provider, devices=tuple(devices or ()))  # type: ignore[arg-type]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is asked for."""
        return bool(self.devices) or self.provider in {"cuda", "tensorrt"}
