"""Loss spikes: no warning for noise, a falling loss or the first steps; one for a jump."""

from pathlib import Path

import numpy as np

from mmrec.data.corpus import Corpus
from mmrec.training.divergence import SPIKE_WINDOW, limit_reached, loss_spike
from tests.conftest import make_trainer


def test_a_jump_is_a_spike_and_noise_is_none() -> None:
    rng = np.random.default_rng(0)
    falling = (9 * np.exp(-np.arange(3000) / 300) + 2 + 0.08 * rng.standard_normal(3000)).tolist()
    assert not [i for i in range(3000) if loss_spike(falling[: i + 1]) is not None]
    assert loss_spike([*falling, 2.2]) is None
    median = loss_spike([*falling, 3.5])
    assert median is not None
    assert abs(median - 2) < 0.05
    assert loss_spike([1.0, 1.0, 50.0]) is None  # too few losses to compare with
    constant = [2.0] * SPIKE_WINDOW  # its deviation is zero: a sixth of the median counts
    assert loss_spike([*constant, 2.2]) is None
    assert loss_spike([*constant, 2.5]) == 2.0


def test_a_run_warns_of_nearby_spikes_once(corpus: Corpus, tmp_path: Path) -> None:
    trainer = make_trainer(corpus, tmp_path, steps=60, eval_every=30)
    train_step = trainer.train_step

    def step_with_jumps() -> tuple[float, float, float]:
        loss, norm, lr = train_step()
        return loss + (20 if trainer.progress.step in (40, 45) else 0), norm, lr

    trainer.train_step = step_with_jumps  # type: ignore[method-assign]
    trainer.fit()
    printed: list[str] = trainer.lines  # type: ignore[attr-defined]
    warnings = [line for line in printed if line.startswith("spike: loss")]
    assert len(warnings) == 1
    assert "at step 41" in warnings[0]
    assert trainer.progress.last_spike_step == 41


def test_each_policy_has_its_own_limits() -> None:
    assert limit_reached("skip", 4, 99, 9) is None
    assert limit_reached("skip", 0, 100, 0) == "after 100 skipped steps"
    assert limit_reached("rollback", 9, 999, 2) is None
