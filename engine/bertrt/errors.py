"""Every error that BertRT raises on purpose.

The hierarchy (each class's docstring says when it is raised)::

    BertRTError
    ├── InputError (also a ValueError)      the question cannot be answered as it was asked
    │   ├── EmptyTextError
    │   ├── MaskNotFoundError
    │   ├── TooManyMasksError
    │   ├── SequenceTooLongError
    │   └── TextEncodingError
    ├── MissingHeadError                    this checkpoint never had what was asked for
    ├── EngineClosedError
    ├── EngineFolderError                   the folder on disk is not an engine that can be trusted
    │   ├── EngineNotFoundError
    │   ├── ManifestError
    │   ├── UnsupportedVersionError
    │   ├── UnsafePathError
    │   ├── MissingFileError
    │   ├── HashMismatchError
    │   ├── ShapeMismatchError
    │   ├── WeightFileError
    │   └── PlanMismatchError
    ├── TokenizerError                      tokenizer files that are missing, corrupt or not WordPiece
    ├── BackendError
    │   ├── BackendUnavailableError
    │   │   └── KernelsNotBuiltError
    │   └── BackendRunError
    │       └── DeviceError
    │           ├── DeviceMemoryError
    │           └── DeviceLostError
    ├── CheckpointError                     the source of an export is not a BERT that we know
    │   ├── CheckpointNotFoundError
    │   ├── DownloadError
    │   ├── CorruptCheckpointError
    │   ├── UnsupportedModelError
    │   ├── MissingTensorError
    │   ├── UnexpectedTensorError
    │   ├── TensorShapeError
    │   └── NonFiniteWeightsError
    ├── ExportError                         the engine folder could not be built or written
    │   ├── CalibrationError
    │   └── PlanBuildError
    ├── ReferenceUnavailableError           the PyTorch reference of a comparison cannot run
    └── MeasurementError                    a benchmark could not be run
        └── AnswersDisagreeError            its contestants do not answer the same

A message names what was wrong, what was expected, and what to do.
"""

from __future__ import annotations


class BertRTError(Exception):
    """Base of every error that BertRT raises on purpose."""


class InputError(BertRTError, ValueError):
    """An argument or a text that cannot be answered as it was given.

    Attributes:
        index: of the text or pair at fault among those of the call; ``None`` where it is not one of them.
    """

    def __init__(self, message: str = "", *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class EmptyTextError(InputError):
    """A text without a single token: empty, white space, or characters that the tokenizer drops."""


class MaskNotFoundError(InputError):
    """A text for fill-mask without a mask token, or whose mask would be lost to truncation."""


class TooManyMasksError(InputError):
    """A text for fill-mask with more mask tokens than the call allows."""


class SequenceTooLongError(InputError):
    """More tokens than the model has positions, under the policy ``overflow="error"``."""


class TextEncodingError(InputError):
    """Bytes that are not UTF-8, or a text that no tokenizer can encode."""


class MissingHeadError(BertRTError):
    """A head was asked for that the engine's checkpoint does not have."""


class EngineClosedError(BertRTError):
    """An engine was used after ``close``."""


class EngineFolderError(BertRTError):
    """Base of everything that can be wrong with an engine folder."""


class EngineNotFoundError(EngineFolderError):
    """There is no engine folder at the path."""


class ManifestError(EngineFolderError):
    """``engine.json`` is not JSON, or a field is missing or of the wrong type."""


class UnsupportedVersionError(EngineFolderError):
    """The folder was written in a format version that this release does not read."""


class UnsafePathError(EngineFolderError):
    """A path in the manifest is absolute, leaves the folder, or is a link that does."""


class MissingFileError(EngineFolderError):
    """A file named in the manifest is not there."""


class HashMismatchError(EngineFolderError):
    """A file's size or SHA-256 is not the one in the manifest."""


class ShapeMismatchError(EngineFolderError):
    """A model file's inputs, outputs or tensors are not what the manifest's architecture implies."""


class WeightFileError(EngineFolderError):
    """The native backend's weight file is corrupt, truncated, of another version, or no weight file at all."""


class PlanMismatchError(EngineFolderError):
    """A TensorRT plan is of another library or release, or for other GPUs; the message says how to rebuild it."""


class TokenizerError(BertRTError):
    """Tokenizer files that are missing, corrupt, or not a BERT WordPiece tokenizer."""


class BackendError(BertRTError):
    """Base of what backends raise."""


class BackendUnavailableError(BackendError):
    """A backend cannot run here; the message says why and what to install or choose instead."""


class KernelsNotBuiltError(BackendUnavailableError):
    """bertrt was installed without its native kernels."""


class BackendRunError(BackendError):
    """A backend failed while it loaded or ran a model; the cause is chained."""


class DeviceError(BackendRunError):
    """A GPU refused or failed; the engine stays usable unless it is a `DeviceLostError`."""


class DeviceMemoryError(DeviceError):
    """A GPU has not enough free memory."""


class DeviceLostError(DeviceError):
    """A GPU failed in a way that only a new process mends; the engine has been closed."""


class CheckpointError(BertRTError):
    """Base of everything that can be wrong with the source of an export."""


class CheckpointNotFoundError(CheckpointError):
    """No such folder, or a folder without the files of a checkpoint."""


class DownloadError(CheckpointError):
    """A checkpoint could not be had from the hub."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's file cannot be parsed, or ends too early."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is not BERT, or a BERT with a part that BertRT does not implement."""


class MissingTensorError(CheckpointError):
    """A tensor that the architecture needs is not in the checkpoint."""


class UnexpectedTensorError(CheckpointError):
    """The checkpoint holds a tensor that no supported BERT has."""


class TensorShapeError(CheckpointError):
    """A tensor's shape or type is not what the configuration says."""


class NonFiniteWeightsError(CheckpointError):
    """A weight is NaN or infinite."""


class ExportError(BertRTError):
    """An engine folder could not be built or written; nothing was left behind."""


class CalibrationError(ExportError):
    """The scales of the activations could not be found from the text that was given."""


class PlanBuildError(ExportError):
    """TensorRT could not read a graph, or build a plan of it; the message names the node where one is known."""


class ReferenceUnavailableError(BertRTError):
    """PyTorch or transformers, which a comparison needs, is not installed or cannot load the checkpoint."""


class MeasurementError(BertRTError):
    """A benchmark could not be run."""


class AnswersDisagreeError(MeasurementError):
    """The contestants of a benchmark do not give the same answer, so that their times cannot be compared."""
