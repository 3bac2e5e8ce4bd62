"""The spike detector: silent on real noise, on a falling loss and at the start; loud on a jump."""

from pathlib import Path

import numpy as np

from mmrec.data.corpus import Corpus
from mmrec.training.divergence import SPIKE_WINDOW, limit_reached, loss_spike
from tests.conftest import make_trainer


def test_spikes() -> None:
    rng = np.random.default_rng(0)
    falling = (9 * np.exp(-np.arange(3000) / 300) + 2 + 0.08 * rng.standard_normal(3000)).tolist()
    assert not [i for i in range(3000) if loss_spike(falling[: i + 1]) is not None]
    assert loss_spike([*falling, 2.2]) is None
    median = loss_spike([*falling, 3.5])
    assert median is not None
    assert abs(median - 2) < 0.05
    assert loss_spike([1.0, 1.0, 50.0]) is None  # too early to tell
    assert (
        loss_spike([2.0] * SPIKE_WINDOW + [2.2]) is None
    )  # an exactly level loss is no reason to panic
    assert loss_spike([2.0] * SPIKE_WINDOW + [2.5]) == 2.0


def test_it_is_said_once(corpus: Corpus, tmp_path: Path) -> None:
    made = make_trainer(corpus, tmp_path, steps=60, eval_every=30)
    take = made.train_step

    def jumping() -> tuple[float, float, float]:
        loss, norm, lr = take()
        return loss + (20 if made.progress.step in (40, 45) else 0), norm, lr

    made.train_step = jumping  # type: ignore[method-assign]
    made.fit()
    said = [x for x in made.lines if x.startswith("spike: loss")]  # type: ignore[attr-defined]
    assert len(said) == 1
    assert "at step 41" in said[0]
    assert made.progress.last_spike_step == 41


def test_limits_count_what_their_policy_does() -> None:
    assert limit_reached("skip", 4, 99, 9) is None
    assert limit_reached("skip", 0, 100, 0) == "after 100 skipped steps"
    assert limit_reached("rollback", 9, 999, 2) is None
