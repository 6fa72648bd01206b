"""Whether everybody answers the same, before anybody is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bertrt.architecture import BertArchitecture
from bertrt.manifest import Precision
from bertrt_bench import agreement
from bertrt_bench.cases import Case
from bertrt_bench.contestants import Answer


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

    def check(self, name: str, precision: Precision, case: Case, answer: Answer) -> dict[str, Any]:
        """Check an answer, and say how far it is from the first one.

        Returns:
            ``reference``, the name of who gave it; ``error`` and ``tolerance``; of the first answer the name alone.

        Raises:
            MeasurementError: an array is missing, or of the wrong shape.
            AnswersDisagreeError: not finite, or beyond the tolerance.
        """
        agreement.check_answer(name, case, answer, agreement.answer_shapes(case, self.architecture))
        if case not in self._answers:
            self._answers[case] = name, precision, answer
            return {"reference": name}
        reference, other, expected = self._answers[case]
        tolerance = agreement.coarser(precision, other)
        outcome = agreement.compare(case, tolerance, answer, expected)
        agreement.require(case, name, reference, outcome, outcome="it is not timed")
        return {"reference": reference, **asdict(outcome)}
