"""Settings: declared once, written as TOML and read back, and clear about every wrong value."""

import dataclasses
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from mmrec.config import (
    MODEL_SETTINGS,
    PRESETS,
    TRAIN_SECTIONS,
    TRAIN_SETTINGS,
    ModelConfig,
    TrainConfig,
    config_to_toml,
    preset,
    read_config_file,
)
from mmrec.errors import InputError
from mmrec.runtime.atomic import atomic_write_text


def test_toml_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As editors on Windows write it."""
    path = tmp_path / "c.toml"
    path.write_bytes(b'\xef\xbb\xbfpreset = "mini"\r\n[optimizer]\r\nlr = 0.5\r\n')
    file = read_config_file(path)
    assert (file.preset, file.train) == ("mini", {"lr": 0.5})


@hypothesis.given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    st.sampled_from(
        [
            n
            for n, s in TRAIN_SETTINGS.items()
            if s.type is str and not s.choices and n not in ("until", "log")
        ]
    ),
)
@hypothesis.example(
    'a "quoted" \\ path\nwith a line end,\r\n a tab\t, [brackets], """ and é', "data"
)
@hypothesis.example("runs/x\ny\u2028\x1b\x7f\ufeff", "out")
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    """Of any text, in every setting that takes one, and as the name of the preset."""
    train = TrainConfig.from_flat({"minutes": 2.5, "lr": 1e-4, "skip_bad": True, name: text})
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    atomic_write_text(path, config_to_toml(PRESETS["mini"], train, text))
    file = read_config_file(path)
    assert file.preset == text
    assert ModelConfig.from_dict(file.model) == PRESETS["mini"]
    assert TrainConfig.from_flat(file.train) == train


def test_a_configuration_survives_json_and_flat_names() -> None:
    train = TrainConfig.from_flat({"steps": 3, "batch_size": 4, "initialize_from": "x"})
    assert TrainConfig.from_dict(dataclasses.asdict(train)) == train
    assert TrainConfig.from_flat(train.flat()) == train
    assert train.replace(steps=None, epochs=1).length.epochs == 1.0


def test_flat_names_are_unique_and_every_setting_has_help() -> None:
    declared = [s for cls in TRAIN_SECTIONS.values() for s in cls.settings().values()]
    names = [s.flat_name for s in declared] + [n for n in MODEL_SETTINGS if n != "vocab_size"]
    assert len(set(names)) == len(names)
    assert set(TRAIN_SETTINGS) <= set(names)
    for s in [*declared, *MODEL_SETTINGS.values()]:
        assert s.help.endswith("."), s.name
        assert s.check(s.default) == s.default


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": float("nan")}, "lr must be finite and > 0; got nan"),
        ({"lr": float("inf")}, "lr must be finite and > 0; got inf"),
        ({"seq_len": 0}, "seq_len must be a whole number from 1 to .*; got 0"),
        ({"steps": 5, "epochs": 1.0}, "only one of steps, epochs, minutes, .*; got steps, epochs"),
        ({"minutes": -1.0}, r"minutes must lie in \(0, 10\^15\]; got -1"),
        ({"epochs": 10**400}, r"epochs must lie in .*; got 1000"),
        ({"schedule": "cosinus"}, "schedule must be one of .*; got 'cosinus'; did you mean"),
        ({"warmup": 2.0}, r"warmup must lie in \[0, 1\]"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2\^63 - 1; got -1"),
        ({"lrr": 1.0}, "unknown setting 'lrr'; did you mean 'lr'"),
        ({"batch_size": 2.5}, "batch_size must be of type int; got 2.5"),
        ({"batch_size": True}, "batch_size must be of type int; got True"),
        ({"steps": "x"}, "steps must be of type int or left out; got 'x'"),
        ({"data": 3}, "data must be of type str; got 3"),
        ({"data": ""}, "data must name a text; got ''"),
        ({"data": "caf\udce9"}, r"data must be text in UTF-8 without a NUL, .*; got 'caf\\udce9'"),
        ({"out": "a\0b"}, r"out must be text in UTF-8 without a NUL, .*; got 'a\\x00b'"),
        ({"lora_rank": 2}, "lora_rank needs initialize_from"),
        ({"replay_fraction": 0.1}, "replay_fraction needs replay_data"),
        ({"keep_checkpoints": 0, "on_nan": "rollback"}, "keep_checkpoints must be >= 1"),
    ],
)
def test_wrong_training_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_flat(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 3}, "heads must divide the width 128; got 3"),
        ({"recurrent_blocks": 7}, "recurrent_blocks must divide the width 128; got 7"),
        ({"ffn_multiplier": 0.001}, "ffn_multiplier times the width 128 must be at least 1; got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"layer_types": "x"}, "layer_types must be letters out of"),
        ({"ffn_multiplier": 0.0}, r"ffn_multiplier must lie in \(0, 64\]"),
        ({"depth": 0}, "depth must be a whole number from 1 to .*; got 0"),
        ({"max_ngram": 6}, "max_ngram must be a whole number from 2 to 5; got 6"),
        ({"widht": 3}, "unknown setting 'widht' in .model.; did you mean 'width'"),
    ],
)
def test_wrong_model_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict(dataclasses.asdict(PRESETS["tiny"]) | values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [", "is not TOML"),
        ("a = " + "[" * 9999, "is not TOML"),
        ("[length]\nsteps = " + "9" * 9999, "is not TOML"),
        ("[trian]\nlr = 1", "got 'trian'"),
        ("[optimiser]\nlr = 1", "got 'optimiser'; did you mean 'optimizer'"),
        ("lr = 1", "got 'lr'"),
        ("preset = 3", "preset in .* must be a name; got 3"),
        ("[optimizer]\nlrr = 1", r"unknown setting 'lrr' in \[optimizer\] .*; did you mean 'lr'"),
        ("[data]\nlr = 1", r"unknown setting 'lr' in \[data\]"),
        ("[length]\nsteps = 'x'", "steps must be of type int or left out; got 'x'"),
        ("[optimizer]\nlr = -1", "lr must be finite and > 0; got -1"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_config_file(path)


def test_missing_names() -> None:
    with pytest.raises(InputError, match="unknown preset 'tniy': expected one of tiny.*'tiny'"):
        preset("tniy")
    with pytest.raises(InputError, match="cannot read config file"):
        read_config_file(Path("none.toml"))
