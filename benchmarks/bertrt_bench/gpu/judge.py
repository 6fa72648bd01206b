"""Whether everybody answers the same, before anybody is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from bertrt.architecture import BertArchitecture
from bertrt.errors import AnswersDisagreeError
from bertrt.manifest import Precision
from bertrt_bench import agreement
from bertrt_bench.cases import TOP_K, Case
from bertrt_bench.contestants import Answer

# Numbers in one array of an answer that is compared (16 MiB of float32).
_LARGEST_ARRAY: Final = 1 << 22


@dataclass(slots=True, kw_only=True)
class Judge:
    """Keeps the first answer to each case, and compares all others with it.

    The first contestant of a run computes in float32; where it could not answer, the next one's answer is the measure,
    and the tolerance is that of the coarser of the two.

    Attributes:
        architecture: of the model.
    """

    architecture: BertArchitecture
    _answers: dict[Case, tuple[str, Precision, Answer]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of an answer that are compared at most; see `bertrt_bench.protocol.sample_rows`."""
        return max(1, _LARGEST_ARRAY // self.architecture.hidden_size)

    def check(self, name: str, precision: Precision, case: Case, answer: Answer) -> dict[str, Any]:
        """Check an answer, and say how far it is from the first one.

        Returns:
            ``reference``, the name of who gave it; ``error`` and ``tolerance``; of the first answer the name alone.

        Raises:
            MeasurementError: an array is missing, or of the wrong shape.
            AnswersDisagreeError: not finite, or beyond the tolerance.
        """
        shapes = agreement.answer_shapes(
            case,
            hidden_size=self.architecture.hidden_size,
            vocab_size=self.architecture.vocab_size,
            top_k=TOP_K,
            rows=self.rows,
        )
        agreement.check_answer(name, case, answer, shapes)
        if case not in self._answers:
            self._answers[case] = name, precision, answer
            return {"reference": name}
        reference, other, expected = self._answers[case]
        tolerance = agreement.coarser(precision, other)
        outcome = agreement.compare(case, tolerance, answer, expected)
        if not outcome.error <= outcome.tolerance:
            raise AnswersDisagreeError(
                f"{name} and {reference} disagree on {case}: {agreement.MEASURES[case.task]}, is "
                f"{outcome.error:.3g}, the tolerance {outcome.tolerance:g}; it is not timed"
            )
        return {"reference": reference, **asdict(outcome)}
