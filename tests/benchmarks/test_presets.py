"""Which preset for which time: the table, and the fit that predicts a longer run."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
try:
    presets = importlib.import_module("presets")
finally:
    sys.path.remove(str(FOLDER))


def row(name: str, minutes: float, seed: int, bits: float) -> dict[str, Any]:
    return {
        "preset": name,
        "minutes": minutes,
        "seed": seed,
        "bits_per_byte": bits,
        "tokens": 6000,
        "seconds": 2.0,
        "curve": [[60.0, bits + 0.1], [60.0 * minutes, bits]],
    }


ROWS = [
    *(row("mini", 20.0, seed, bits) for seed, bits in enumerate((1.62, 1.60, 1.70))),
    row("mini", 5.0, 0, 1.9),
    row("tiny", 5.0, 0, 1.8),
    row("tiny", 20.0, 0, 1.65),
]


def test_the_table_has_medians_and_the_best_of_each_time() -> None:
    assert presets.table(ROWS)[2:] == [
        "| tiny | **1.800** | 1.650 | 3,000 |",
        "| mini | 1.900 | **1.620** | 3,000 |",
    ]


def test_the_fit_predicts_the_longest_run() -> None:
    times = np.array([2.0, 5.0, 10.0, 20.0, 60.0])
    points = dict(zip(times.tolist(), (1.3 + 0.8 * times**-0.4).tolist(), strict=True))
    found = presets.predict(points)
    assert found["error"] == pytest.approx(0, abs=1e-4)
    assert (found["E"], found["a"]) == pytest.approx((1.3, 0.4), abs=1e-2)
    points[60.0] *= 1.05  # the longest run has no part in the fit
    assert presets.predict(points)["error"] == pytest.approx(1 / 1.05 - 1, abs=1e-4)
    assert presets.predict({5.0: 1.8, 20.0: 1.6, 60.0: 1.5}) is None


def test_the_picture(tmp_path: Path) -> None:
    presets.draw(ROWS, tmp_path / "presets.png", "books")
    assert (tmp_path / "presets.png").stat().st_size > 5000


def test_a_run_on_one_core(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "book.txt").write_text(text_file.read_text()[:60_000])
    small = ["--vocab", "300", "--width", "16", "--heads", "2", "--depth", "4"]
    small += ["--batch-size", "2", "--seq-len", "32", "--eval-every", "5", "--eval-tokens", "500"]
    found = presets.train(presets.Cell("tiny", 0.02, 3), str(tmp_path / "book.txt"), 0, small)
    assert (found["preset"], found["minutes"], found["seed"]) == ("tiny", 0.02, 3)
    assert 1.0 < found["bits_per_byte"] < 9.0
    assert found["seconds"] >= 1.2
    assert found["curve"]
    with pytest.raises(RuntimeError, match="no data at none.txt"):
        presets.train(presets.Cell("tiny", 0.02, 3), "none.txt", 0, [])
