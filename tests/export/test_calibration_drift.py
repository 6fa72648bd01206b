"""What calibration is for: an int8 engine that answers as PyTorch does, on text that it was not calibrated with."""

from __future__ import annotations

from pathlib import Path

from bertrt.folder import EngineFolder
from bertrt_export.calibration import Recipe, calibrate
from bertrt_export.checkpoints import open_checkpoint
from bertrt_export.demo import evaluation_text
from bertrt_export.drift.compare import compare
from bertrt_export.drift.examples import build_examples
from bertrt_export.drift.reference import open_reference
from bertrt_export.drift.text import read_corpus
from bertrt_export.exporter import export_engine
from bertrt_export.graph.twin import TwinBackend


def test_the_default_recipe_on_held_out_text(tmp_path: Path) -> None:
    chapters = evaluation_text().read_text(encoding="utf-8").split("\n\n")
    seen, unseen = "\n\n".join(chapters[:5]), "\n\n".join(chapters[5:])
    with (
        open_checkpoint("demo") as checkpoint,
        open_reference(checkpoint, checkpoint.heads, threads=2) as torch,
    ):
        corpus = read_corpus(unseen, checkpoint.tokenizer, name="unseen", max_length=512)
        examples = list(build_examples(corpus, checkpoint.tokenizer, count=40, seed=0, max_length=512))
        divergences = []
        for number, recipe in enumerate((None, Recipe())):
            out = tmp_path / f"engine-{number}"
            calibration = calibrate(
                checkpoint, seen, precision="int8", recipe=recipe, max_texts=600, threads=2
            )
            export_engine(checkpoint, out, precision="int8", target="tensorrt", calibration=calibration)
            backend = TwinBackend(EngineFolder.open(out), threads=2)
            found = compare(
                backend,
                torch,
                None,
                tokenizer=checkpoint.tokenizer,
                heads=checkpoint.heads,
                examples=examples,
                max_length=512,
            )
            backend.close()
            divergences.append(found.figures["kl_mean"])
    # A KL divergence is half the mean square of what moves the logits: halving it takes 3 dB of noise, half a bit of
    # the eight. Channels that share a scale as they are must give away at least that.
    assert divergences[0] < divergences[1] / 2
    # A fifth of the budget of int8, see `bertrt_export.drift.budgets`.
    assert divergences[0] < 0.002
