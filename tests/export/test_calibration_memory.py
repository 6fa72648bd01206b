"""What calibration holds in memory does not grow with the text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

if not Path("/proc/self/status").is_file():
    pytest.skip("the system tells nothing of a process's peak (/proc/self/status)", allow_module_level=True)

# Two passes, with histograms. Batches are cut to what 2 MiB of activations hold. Prints the peak in bytes: of this
# process alone, where the resource module would count what the parent occupied when it started it.
PROGRAM = """
import sys
from pathlib import Path
from bertrt_export.calibration import calibrate, taps
from bertrt_export.checkpoints import open_checkpoint

taps._VALUES_AT_ONCE = 1 << 19
with open_checkpoint("demo") as checkpoint:
    found = calibrate(
        checkpoint, Path(sys.argv[1]), precision="int8", method="percentile", max_texts=int(sys.argv[2]), threads=2
    )
assert found.sequences == int(sys.argv[2])
assert found.tokens > 100 * found.sequences
with open("/proc/self/status") as lines:
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))
"""


def peak(path: Path, texts: int) -> int:
    command = [sys.executable, "-c", PROGRAM, str(path), str(texts)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


def test_the_peak_is_the_same_for_four_times_the_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    sentence = "The old man walked down to the sea with a book in his hand and a dog behind him. "
    path.write_text("\n".join(f"Number {number}. {sentence * 5}" for number in range(200)), encoding="utf-8")
    few, many = (peak(path, texts) for texts in (50, 200))
    # A token of the demo's four layers has 7,168 tapped values: the 150 texts more, held at once, would be 550 MB.
    # The allocators' own ups and downs are a few megabytes.
    assert many - few < 40_000_000, (few, many)
