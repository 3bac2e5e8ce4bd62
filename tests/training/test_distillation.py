"""Distillation: the loss against its definition, teachers that do not fit, and exact resume."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.config import ModelConfig, TrainConfig
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.errors import InputError
from mmrec.model import Model
from mmrec.training import distillation, trainer
from mmrec.training.distillation import Teachers, distillation_loss
from mmrec.training.replicas import Replicas
from mmrec.training.setup import plan_run
from tests.conftest import make_trainer

CONFIG = ModelConfig(16, 2, 2, vocab_size=11, layer_types="nl", ngram_buckets=32)


def logits_of(model: Model, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(tokens)[0].double().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def randomised(config: ModelConfig = CONFIG) -> Model:
    """A model whose layers do something: new ones end in zeros."""
    model = Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_the_cross_entropy_with_the_mean_of_the_teachers(weight: float) -> None:
    student, *models = (randomised() for _ in range(3))
    tokens, targets = torch.randint(11, (2, 2, 7))
    loss, _ = distillation_loss(student, tokens, targets, teachers=Teachers(models), weight=weight)
    mean = np.mean([softmax(logits_of(m, tokens)) for m in models], axis=0)
    log_p = np.log(softmax(logits_of(student, tokens)))
    text = -np.take_along_axis(log_p, targets.numpy()[..., None], -1).mean()
    expected = weight * -(mean * log_p).sum(-1).mean() + (1 - weight) * text
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for m in models for p in m.parameters())
    # at the student's own prediction the gradient of the logits is zero
    student.zero_grad()
    own = Teachers([student_copy(student)])
    distillation_loss(student, tokens, targets, teachers=own, weight=1.0)[0].backward()
    assert student.embedding.grad is not None
    assert student.embedding.grad.abs().max() < 1e-6


def student_copy(student: Model) -> Model:
    copy = Model(student.config)
    copy.load_state_dict(student.state_dict())
    return copy


@pytest.fixture(scope="module")
def teachers(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two runs of other seeds."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (1, 2):
        make_trainer(corpus, folder / f"{seed}", steps=4, seed=seed).fit()
    return f"{folder}/1, {folder}/2/last.h5"


@pytest.mark.parametrize("replicas", ["threads", "processes"])
def test_a_stopped_run_with_teachers_resumes_bit_for_bit(
    corpus: Corpus, tmp_path: Path, teachers: str, replicas: str
) -> None:
    settings = {"teachers": teachers, "teacher_weight": 0.8, "replicas": replicas}
    whole = make_trainer(corpus, tmp_path / "whole", **settings | {"replicas": "threads"})
    whole.fit()
    assert "mean prediction of 2 models, and for 0.2" in "\n".join(whole.lines)  # type: ignore[attr-defined]
    plain = make_trainer(corpus, tmp_path / "plain")
    plain.fit()
    assert not torch.equal(plain.model.embedding, whole.model.embedding)
    first = make_trainer(corpus, tmp_path / "run", **settings)
    step = first.train_step

    def stop_after_seven() -> tuple[float, float, float]:
        if first.progress.step == 6:
            first.request_stop()
        return step()

    first.train_step = stop_after_seven  # type: ignore[method-assign]
    assert first.fit()["steps"] == 7
    resumed = make_trainer(corpus, tmp_path / "run", **settings)
    assert resumed.fit(resume=True)["steps"] == 12
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = settings | {"teachers": teachers.split(",")[0]}
    with pytest.raises(InputError, match=r"the teachers .*/1 have changed since"):
        make_trainer(corpus, tmp_path / "run", **other).fit(resume=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("end_of_text", [None, 0])
def test_the_table_has_the_prediction_after_each_token(
    monkeypatch: pytest.MonkeyPatch, threads: int, end_of_text: int | None
) -> None:
    monkeypatch.setattr(distillation, "TABLE_STREAMS", 3)
    monkeypatch.setattr(distillation, "TABLE_WINDOW", 8)
    teachers = Teachers([randomised(), randomised()])
    tokens = torch.randint(11, (64,)).numpy().astype(np.uint16)
    counts: list[int] = []
    table = teachers.predict_text(tokens, end_of_text, Replicas(threads), counts.append)
    assert sum(counts) == len(tokens)
    assert (table.dtype, table.nbytes) == (np.float16, teachers.table_bytes(len(tokens)))
    for begin in range(0, 64, 22):  # the three streams
        part = torch.from_numpy(tokens[begin : begin + 22].astype(np.int64))[None]
        starts = None if end_of_text is None else part == end_of_text
        expected = teachers.probabilities(part, starts)[0]
        np.testing.assert_allclose(table[begin : begin + 22], expected, atol=1e-3)
    assert np.allclose(table.sum(1, dtype=np.float64), 1, atol=1e-3)


def test_a_table_and_asking_each_time_teach_the_same(
    corpus: Corpus, tmp_path: Path, teachers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the context before a window, which the table has and a window has not."""
    losses = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(trainer, "MAX_TABLE_BYTES", limit)
        run = make_trainer(corpus, tmp_path / f"{limit}", teachers=teachers, steps=1, seq_len=64)
        run._precompute_predictions()
        assert (run._predictions is not None) is (limit > 0)
        assert ("have read the text once" in "\n".join(run.lines)) is (limit > 0)  # type: ignore[attr-defined]
        losses.append(run.train_step()[0])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_teachers_need_the_tokenizer_of_the_run(
    text_file: Path, tmp_path: Path, teachers: str
) -> None:
    characters = Corpus.open(prepare(str(text_file), "char", out=tmp_path / "char.h5"))
    with pytest.raises(
        InputError, match=r"must have the tokenizer of the run, char of \d+; .*byte"
    ):
        make_trainer(characters, tmp_path / "run", teachers=teachers)


def test_settings_of_teachers() -> None:
    with pytest.raises(InputError, match=r"teacher_weight needs teachers; got 0.7 alone"):
        plan_run("tiny", None, {"teacher_weight": 0.7})  # the default, too
    with pytest.raises(InputError, match=r"teachers need state window or document; got 'carry'"):
        TrainConfig.from_flat({"teachers": "a", "state": "carry"})
    with pytest.raises(InputError, match=r"joined by commas; got 'a,,b'"):
        Teachers.load("a,,b", None, "float32")  # type: ignore[arg-type]
