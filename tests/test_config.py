"""Configuration: written as TOML and read back, and clear about every wrong value."""

from dataclasses import replace
from pathlib import Path

import pytest

from mmrec.config import (
    PRESETS,
    ModelConfig,
    TrainConfig,
    from_dict,
    load_toml,
    preset,
    to_toml,
)
from mmrec.errors import InputError


def test_toml_round_trip(tmp_path: Path) -> None:
    train = TrainConfig(data='a "quoted" \\ path', minutes=2.5, lr=1e-4, skip_bad=True)
    path = tmp_path / "c.toml"
    path.write_text(to_toml(PRESETS["mini"], train, "mini"))
    tables = load_toml(path)
    assert tables["preset"] == "mini"
    assert from_dict(ModelConfig, tables["model"]) == PRESETS["mini"]
    assert from_dict(TrainConfig, tables["train"]) == train


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": float("nan")}, "lr must be finite and > 0; got nan"),
        ({"lr": float("inf")}, "lr must be finite and > 0; got inf"),
        ({"seq_len": 0}, "seq_len must be a whole number from 1 to .*; got 0"),
        (
            {"steps": 5, "epochs": 1.0},
            "only one of steps, epochs, minutes may be given; got steps, ep",
        ),
        ({"minutes": -1.0}, "minutes must be > 0 and at most .*; got -1"),
        (
            {"schedule": "cosinus"},
            "schedule must be one of cosine, linear, constant; got 'cosinus'",
        ),
        ({"warmup": 2.0}, r"warmup must lie in \[0, 1\]"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0"),
        ({"seed": -1}, "seed must lie in 0 to"),
        ({"lrr": 1.0}, "unknown setting 'lrr' for TrainConfig; did you mean 'lr'"),
        ({"batch": 2.5}, "batch must be of type .*int.*; got 2.5"),
        ({"batch": True}, "batch must be of type"),
        ({"data": 3}, "data must be of type"),
    ],
)
def test_wrong_training_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 3}, "heads must divide the width 128; got 3"),
        ({"blocks": 7}, "blocks must divide the width 128; got 7"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"layers": "x"}, "layers must be letters out of"),
        ({"ffn": 0.0}, r"ffn must lie in \(0, 64\]"),
        ({"depth": 0}, "depth must be a whole number from 1 to .*; got 0"),
    ],
)
def test_wrong_model_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(PRESETS["tiny"], **values)  # type: ignore[arg-type]


def test_wrong_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="unknown preset 'tniy': expected one of tiny.*mean 'tiny'"
    ):
        preset("tniy")
    with pytest.raises(InputError, match="cannot read config file"):
        load_toml(tmp_path / "none.toml")
    path = tmp_path / "c.toml"
    path.write_text("a = [")
    with pytest.raises(InputError, match="is not TOML"):
        load_toml(path)
    path.write_text("[trian]\nlr = 1")
    with pytest.raises(InputError, match=r"may hold preset, \[model\] and \[train\]; got 'trian'"):
        load_toml(path)
