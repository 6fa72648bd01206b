"""The engine: one object that answers questions about text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, cast, overload

from bertrt.architecture import BertArchitecture
from bertrt.backends.base import Backend, Float32
from bertrt.backends.placement import Placement, Provider
from bertrt.batching import DEFAULT_TOKEN_BUDGET
from bertrt.errors import EngineClosedError, InputError, ManifestError, ShapeMismatchError
from bertrt.folder import EngineFolder, load_whole
from bertrt.manifest import Heads, Manifest
from bertrt.plans import BUILT_BACKEND
from bertrt.tasks import features as _features
from bertrt.tasks import fill_mask as _fill_mask
from bertrt.tasks import next_sentence as _next_sentence
from bertrt.tasks import score as _score
from bertrt.tasks.context import TaskContext, as_texts, check_integer
from bertrt.tasks.features import Pooling
from bertrt.tasks.fill_mask import DEFAULT_MAX_MASKS, DEFAULT_TOP_K, TextPredictions
from bertrt.tasks.next_sentence import PairOverflow
from bertrt.tasks.score import PseudoLikelihood, ScoreOverflow
from bertrt.tokenization import TOKENIZER_FILES, Overflow, WordPieceTokenizer

_TOKENIZER_NAME = "tokenizer.json"


class Engine:
    """A loaded BERT: `fill_mask`, `next_sentence`, `features` and `score`.

    Every method takes one text or any number of them; one text gives one answer, several give a list in the
    order of the questions, none an empty list. The texts are sorted by length and run in batches of bounded
    size, and an answer does not depend on the other texts of the call. Many threads may use one engine.

    An engine holds its model until `close`; it is also a context manager.

    Attributes:
        backend: what computes.
        tokenizer: the checkpoint's WordPiece tokenizer.
        architecture: the model's dimensions.
        heads: which heads the checkpoint has.
        manifest: of the engine folder, or ``None`` for an engine put together from parts.
        path: of the engine folder, or ``None``.
        name: for messages.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        tokenizer: WordPieceTokenizer,
        architecture: BertArchitecture,
        heads: Heads,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        name: str = "",
        folder: EngineFolder | None = None,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.heads = heads
        self.manifest: Manifest | None = folder.manifest if folder else None
        self.path: Path | None = folder.path if folder else None
        self.name = name or (folder.path.name if folder else backend.name)
        if tokenizer.vocab_size > architecture.vocab_size:
            raise ShapeMismatchError(
                f"the tokenizer of engine {self.name!r} has {tokenizer.vocab_size} tokens, its model has "
                f"{architecture.vocab_size}; they do not belong together: export the engine again"
            )
        self._context = TaskContext(
            backend=backend,
            tokenizer=tokenizer,
            architecture=architecture,
            heads=heads,
            token_budget=check_integer(token_budget, name="token_budget"),
            name=self.name,
        )
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] = "demo",
        *,
        backend: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        provider: Provider | None = None,
        devices: Iterable[int] | None = None,
    ) -> Self:
        """Open an engine folder.

        A folder that is replaced at this moment is loaded again, so that no engine mixes the files of two.

        Args:
            path: the folder, or the name of a built-in engine: ``"demo"`` is exported into the user's cache
                folder when it is first asked for (see `bertrt.builtin.resolve`).
            backend: by name; ``None`` takes the fastest that works here.
            threads: of one run; ``None`` takes the CPUs that the process really has.
            verify: compare the SHA-256 of every file that is read with the manifest before it is read. Files
                of other backends are left alone; `bertrt info --verify` compares them all.
            token_budget: the most tokens of one batch, padding included where the backend pads; less needs
                less memory.
            provider: of the backend ``onnxruntime``: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``; ``None`` takes the
                best that works here.
            devices: GPUs by the driver's numbers, such as ``[0, 1]``: one worker each, and batches are spread over
                them; ``None`` takes the first where the backend computes on GPUs.

        Raises:
            InputError: an option is out of range, or does not suit the backend.
            EngineFolderError: the folder is not there, or cannot be trusted; each violation has its class.
                Also one that is replaced again and again.
            TokenizerError: its tokenizer cannot be read.
            BackendUnavailableError: the backend cannot run here; says why.
            BackendRunError: the backend could not load the model.
            ExportError: the built-in engine could not be made.
        """
        # Imported when an engine is loaded: it reads the package metadata.
        from bertrt.builtin import resolve

        token_budget = check_integer(token_budget, name="token_budget")
        # Read once, as a folder that is replaced while it loads is loaded again.
        gpus = Placement.make(threads=threads, provider=provider, devices=devices).devices
        return load_whole(
            resolve(path, verify=verify),
            lambda folder: cls._of_folder(
                folder, backend, threads, token_budget, verify=verify, provider=provider, devices=gpus
            ),
            discard=cls.close,
            # The others run the graphs, whatever has become of a plan.
            plans=provider is None and backend in {None, BUILT_BACKEND},
        )

    @classmethod
    def _of_folder(
        cls,
        folder: EngineFolder,
        backend: str | None,
        threads: int | None,
        token_budget: int,
        *,
        verify: bool,
        provider: Provider | None,
        devices: tuple[int, ...],
    ) -> Self:
        # Imported when an engine is loaded: it looks for the backends' libraries.
        from bertrt.backends.registry import create_backend

        if _TOKENIZER_NAME not in folder.manifest.files:
            raise ManifestError(
                f"engine.json: {_TOKENIZER_NAME!r} is not among 'files'; export the engine again"
            )
        if verify:
            folder.check(hashes=[name for name in TOKENIZER_FILES if name in folder.manifest.files])
        tokenizer = WordPieceTokenizer.from_folder(folder.path, folder.manifest.files)
        running = create_backend(backend, folder, threads, provider=provider, devices=devices, verify=verify)
        try:
            return cls(
                backend=running,
                tokenizer=tokenizer,
                architecture=folder.manifest.architecture,
                heads=folder.manifest.heads,
                token_budget=token_budget,
                folder=folder,
            )
        except BaseException:
            running.close()
            raise

    @property
    def latency_only(self) -> bool:
        """Whether the weights are random: the engine's speed means something, its answers do not."""
        return self.manifest is not None and self.manifest.latency_only

    @overload
    def fill_mask(  # type: ignore[overload-overlap] # a str is an iterable of str too; it matches here first
        self,
        texts: str,
        *,
        top_k: int = ...,
        targets: str | Iterable[str] | None = ...,
        overflow: Overflow = ...,
        stride: int | None = ...,
        max_masks: int = ...,
    ) -> TextPredictions: ...
    @overload
    def fill_mask(
        self,
        texts: Iterable[str],
        *,
        top_k: int = ...,
        targets: str | Iterable[str] | None = ...,
        overflow: Overflow = ...,
        stride: int | None = ...,
        max_masks: int = ...,
    ) -> list[TextPredictions]: ...
    def fill_mask(
        self,
        texts: str | Iterable[str],
        *,
        top_k: int = DEFAULT_TOP_K,
        targets: str | Iterable[str] | None = None,
        overflow: Overflow = "error",
        stride: int | None = None,
        max_masks: int = DEFAULT_MAX_MASKS,
    ) -> TextPredictions | list[TextPredictions]:
        """Predict the tokens at the masks of each text, as transformers' ``fill-mask`` pipeline (4.57) does.

        The answer to a text with one mask is a list of `MaskPrediction` (``score``, ``token``, ``token_str``,
        ``sequence``), most probable first, equal scores by rising token id; to a text with several masks a
        list of such lists, in the order of the masks, each mask predicted on its own while the others stay
        masked. As in the pipeline, ``sequence`` is without special tokens if the text has one mask, and with
        them, the other masks among them, if it has several; padding tokens are never in it.

        Two things differ from the pipeline. A list of one text gives a list of one answer, where the pipeline
        takes the answer out of its list. A target that is not in the vocabulary is an error, where the
        pipeline takes the first of its pieces.

        Args:
            texts: one text or several, with the tokenizer's mask token (`tokenizer.mask_token`) in each.
            top_k: predictions for each mask, from 1 to the size of the vocabulary.
            targets: rank these tokens only; their scores stay probabilities over the whole vocabulary. One
                named twice counts once, and ``top_k`` is cut to their number.
            overflow: what to do with a text that has more tokens than the model has positions: ``"error"``;
                ``"truncate"``, which cuts its end off; or ``"window"``, which cuts it into overlapping
                windows and answers each mask from the window where the shorter of its two sides has most
                tokens (of equals the longer window, then the first); ``sequence`` is then that window's text.
            stride: tokens by which windows overlap, from 0 to one less than a window's content; half the
                content of a window by default. Used by ``"window"`` only.
            max_masks: the most masks in one text.

        Raises:
            MissingHeadError: the checkpoint has no masked-LM head.
            EmptyTextError, MaskNotFoundError, TooManyMasksError, SequenceTooLongError, TextEncodingError: a
                text cannot be answered; the message gives its index. A mask lost to truncation is a
                `MaskNotFoundError`.
            InputError: an option out of range, or a target that is not in the vocabulary.
            EngineClosedError: after `close`.
            BackendRunError: the backend failed.
        """
        items, single = as_texts(texts)
        answers = _fill_mask.fill_mask(
            self._open_context(),
            items,
            top_k=top_k,
            targets=targets,
            overflow=overflow,
            stride=stride,
            max_masks=max_masks,
        )
        return answers[0] if single else answers

    @overload
    def next_sentence(  # type: ignore[overload-overlap] # a str is an iterable of str too; it matches here first
        self, a: str, b: str, *, overflow: PairOverflow = ...
    ) -> float: ...
    @overload
    def next_sentence(
        self, a: Iterable[str], b: Iterable[str], *, overflow: PairOverflow = ...
    ) -> list[float]: ...
    def next_sentence(
        self, a: str | Iterable[str], b: str | Iterable[str], *, overflow: PairOverflow = "error"
    ) -> float | list[float]:
        """Give the probability, from 0 to 1, that text ``b`` follows text ``a``.

        Args:
            a: one text or several.
            b: as many.
            overflow: what to do with a pair that has more tokens than the model has positions: ``"error"``,
                or ``"truncate"``, which takes tokens from the end of the longer text until the pair fits.

        Raises:
            MissingHeadError: the checkpoint has no next-sentence head.
            InputError: ``a`` and ``b`` differ in number, or another fault of the texts, as in `fill_mask`.
            EngineClosedError: after `close`.
            BackendRunError: the backend failed.
        """
        (first, single), (second, single_b) = as_texts(a, name="a"), as_texts(b, name="b")
        if single != single_b:
            raise InputError(
                "a and b must both be str or both be sequences of str; pass two of the same kind"
            )
        answers = _next_sentence.next_sentence(self._open_context(), first, second, overflow=overflow)
        return answers[0] if single else answers

    @overload
    def features(  # type: ignore[overload-overlap] # a str is an iterable of str too; it matches here first
        self, texts: str, *, pooling: Pooling = ..., overflow: Overflow = ..., stride: int | None = ...
    ) -> Float32: ...
    @overload
    def features(
        self,
        texts: Iterable[str],
        *,
        pooling: Literal["none"] = ...,
        overflow: Overflow = ...,
        stride: int | None = ...,
    ) -> list[Float32]: ...
    @overload
    def features(
        self,
        texts: Iterable[str],
        *,
        pooling: Literal["cls", "mean", "pooler"],
        overflow: Overflow = ...,
        stride: int | None = ...,
    ) -> Float32: ...
    def features(
        self,
        texts: str | Iterable[str],
        *,
        pooling: Pooling = "none",
        overflow: Overflow = "error",
        stride: int | None = None,
    ) -> Float32 | list[Float32]:
        """Give the last hidden states, or one vector for each text, as float32.

        ======== ============================ ============== ============== ===============================
        pooling  what it is                   one text       several texts  under ``overflow="window"``
        ======== ============================ ============== ============== ===============================
        none     every token's hidden state,  [tokens,       list of        [CLS] of the first window, each
                 [CLS] and [SEP] included     hidden]        such arrays    content token once (the mean of
                                                                            its states in the windows that
                                                                            hold it), [SEP] of the last
        mean     mean of the rows of "none"   [hidden]       [texts,        the same mean of those rows
                                                             hidden]
        cls      hidden state of [CLS]        [hidden]       [texts,        mean over the windows, weighted
                                                             hidden]        by their tokens
        pooler   the pooler's output: tanh    [hidden]       [texts,        as cls
                 of a dense layer on [CLS]                   hidden]
        ======== ============================ ============== ============== ===============================

        A text that fits gives the same under every ``overflow``. No texts give an empty list for "none" and
        an array of shape ``[0, hidden]`` otherwise.

        Args:
            texts: one text or several.
            pooling: see the table.
            overflow: what to do with a text that has more tokens than the model has positions: ``"error"``;
                ``"truncate"``, which cuts its end off; or ``"window"``, which cuts it into overlapping
                windows.
            stride: tokens by which windows overlap, from 0 to one less than a window's content; a quarter of
                the content of a window by default. Used by ``"window"`` only.

        Raises:
            MissingHeadError: ``pooling="pooler"`` and the checkpoint has no pooler.
            EmptyTextError, SequenceTooLongError, TextEncodingError: a text cannot be answered; the message
                gives its index.
            InputError: an option out of range.
            EngineClosedError: after `close`.
            BackendRunError: the backend failed.
        """
        items, single = as_texts(texts)
        answers = _features.features(
            self._open_context(), items, pooling=pooling, overflow=overflow, stride=stride
        )
        return cast(Float32, answers[0]) if single else answers

    @overload
    def score(  # type: ignore[overload-overlap] # a str is an iterable of str too; it matches here first
        self, texts: str, *, overflow: ScoreOverflow = ...
    ) -> PseudoLikelihood: ...
    @overload
    def score(self, texts: Iterable[str], *, overflow: ScoreOverflow = ...) -> list[PseudoLikelihood]: ...
    def score(
        self, texts: str | Iterable[str], *, overflow: ScoreOverflow = "error"
    ) -> PseudoLikelihood | list[PseudoLikelihood]:
        """Give the pseudo-log-likelihood of each text (Salazar et al. 2020, https://arxiv.org/abs/1910.14659).

        Each token in turn is masked and predicted from all the others. Special tokens are neither masked nor
        scored, also where the text itself spells them; the unknown token is an ordinary one. A text of ``n``
        tokens costs ``n`` sequences; the masked copies are made batch by batch.

        Args:
            texts: one text or several.
            overflow: ``"error"`` or ``"truncate"``, as in `features`.

        Raises:
            MissingHeadError: the checkpoint has no masked-LM head.
            EmptyTextError, SequenceTooLongError, TextEncodingError: a text cannot be answered; the message
                gives its index.
            InputError: an option out of range, or a text of special tokens only.
            EngineClosedError: after `close`.
            BackendRunError: the backend failed.
        """
        items, single = as_texts(texts)
        answers = _score.score(self._open_context(), items, overflow=overflow)
        return answers[0] if single else answers

    def close(self) -> None:
        """Release the model; calling it again does nothing."""
        self._closed = True
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        precision = f", precision={self.manifest.precision!r}" if self.manifest else ""
        state = ", closed" if self._closed else ""
        return f"Engine({self.name!r}, backend={self.backend.name!r}{precision}{state})"

    def _open_context(self) -> TaskContext:
        if self._closed:
            raise EngineClosedError(f"engine {self.name!r} is closed; load it again with Engine.load")
        return self._context
