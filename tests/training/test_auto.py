"""``auto`` chooses by the size of the text and the time, and what the user gives wins."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import mmrec
from mmrec.config import DEFAULT_EPOCHS, MODEL_SETTINGS, TRAIN_SETTINGS
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import TextSize, measure_text, prepare
from mmrec.data.readers import ReadOptions
from mmrec.errors import InputError
from mmrec.training import auto
from mmrec.training.auto import choose
from mmrec.training.setup import plan_run

SIZES: dict[str, Any] = {
    "width": 16,
    "depth": 1,
    "heads": 2,
    "ngram_buckets": 64,
    "layer_types": "n",
    "precision": "float32",
    "eval_tokens": 500,
    "sample_tokens": 4,
    "progress": False,
}


def text_of(size: float, **others: Any) -> TextSize:
    """An English text of so many bytes, a tenth of them validation text."""
    train, val = int(0.9 * size), int(0.1 * size)
    return TextSize("book.txt", train, train, val, val, **others)


@pytest.mark.parametrize(
    ("size", "given", "cores", "expected"),
    [
        # tinyshakespeare: the settings of the race (docs/benchmarks/race.md)
        (1.1e6, {"minutes": 108 / 60}, 1, ("tiny", "char", 0.0, None, 108 / 60)),
        (1.1e6, {"minutes": 5.0}, 2, ("tiny", "char", 0.1, None, 5.0)),
        (1.1e6, {"minutes": 15.0}, 2, ("tiny", "char", 0.2, 1.0, 15.0)),
        (2e6, {"minutes": 1.0}, 2, ("tiny", "bpe", 0.0, None, 1.0)),  # TinyStories
        (2e6, {"minutes": 108 / 60}, 2, ("tiny", "bpe", 0.2, None, 108 / 60)),
        (2e6, {"minutes": 5.0}, 2, ("tiny", "bpe", 0.2, 1.0, 5.0)),
        (77e6, {"minutes": 20.0}, 1, ("tiny", "bpe", 0.0, None, 20.0)),
        (77e6, {"minutes": 60.0}, 1, ("mini", "bpe", 0.0, None, 60.0)),
        (77e6, {"minutes": 60.0, "tokenizer": "char"}, 1, ("tiny", "char", 0.0, None, 60.0)),
        (4e6, {"minutes": 60.0}, 2, ("tiny", "bpe", 0.2, 1.0, 60.0)),  # mini would memorise it
        (77e6, {}, 2, ("tiny", "bpe", 0.0, None, auto.DEFAULT_MINUTES)),
        (1.1e6, {"epochs": 8.0}, 2, ("tiny", "char", 0.1, None, None)),
        (1.1e6, {"steps": 500}, 2, ("tiny", "char", 0.0, None, None)),
        (1.1e6, {"steps": 5000, "batch_size": 1}, 2, ("tiny", "char", 0.0, None, None)),
        (1.1e6, {"minutes": 15.0, "vocab": 1000}, 2, ("tiny", "bpe", 0.2, 1.0, 15.0)),
        (1.1e6, {"minutes": 15.0, "dropout": 0.3}, 2, ("tiny", "char", 0.3, 1.0, 15.0)),
        (1.1e6, {"minutes": 5.0, "teachers": "a,b"}, 2, ("tiny", "char", 0.0, None, 5.0)),
        (1e5, {"minutes": 5.0}, 2, ("tiny", "char", 0.2, 1.0, 5.0)),
        (1e5, {"until": "2099-01-01 07:00"}, 2, ("tiny", "char", 0.2, 1.0, None)),
    ],
    ids=str,
)
def test_the_rule(size: float, given: dict[str, Any], cores: int, expected: tuple[Any]) -> None:
    choice = choose(text_of(size), given, cores=cores, has_bfloat16=True)
    names = ("tokenizer", "dropout", "weight_decay")
    settings = choice.settings
    found = (choice.preset, *map(settings.get, names))
    assert found == expected[:4]
    assert settings.get("minutes") == expected[4]
    assert choice.note.startswith(f"auto    {choice.preset}, ")
    assert "\n" not in choice.note
    for name in given.keys() - {"minutes"}:
        assert settings[name] == given[name]


def test_the_line_says_what_and_why() -> None:
    note = choose(text_of(1.1e6), {"minutes": 5.0}, cores=2, has_bfloat16=True).note
    assert note == (
        "auto    tiny, by character, dropout 0.1, batch 16 x 256: 1.0 MB of training text will be "
        "read about 13 times in 5 minutes"
    )
    note = choose(text_of(1e5), {}, cores=1, has_bfloat16=False).note
    assert note == (
        "auto    tiny, by character, dropout 0.2, weight decay 1, batch 16 x 256: 90 kB of "
        "training text will be read about 37 times in 5 minutes, the default of auto"
    )
    note = choose(text_of(9e6), {"vocab": 2000}, cores=1, has_bfloat16=False).note
    assert "tiny, vocabulary 2,000, dropout 0, batch 16 x 128: 8.1 MB" in note
    note = choose(text_of(2e7), {"vocab": 2000}, cores=1, has_bfloat16=False).note
    assert "tiny, vocabulary 2,000, 262,144 rows of n-grams, dropout 0, batch 16 x 128: 18" in note


@pytest.mark.parametrize(
    ("size", "given", "rows"),
    [
        (77e6, {"minutes": 5.0}, 262_144),
        (77e6, {"minutes": 60.0}, 131_072),  # mini
        (77e6, {"minutes": 5.0, "width": 64}, 524_288),
        (77e6, {"minutes": 5.0, "ngram_buckets": 99}, 99),
        (77e6, {"minutes": 5.0, "ngram_buckets": 0}, 0),
        (77e6, {"minutes": 5.0, "tokenizer": "char"}, None),
        (9e6, {"epochs": 1.0}, 262_144),
        (9e6, {"epochs": 1.1}, None),
        (1.1e6, {"epochs": 1.0}, None),  # by character
    ],
    ids=str,
)
def test_a_text_that_is_read_once_gets_a_large_table(
    size: float, given: dict[str, Any], rows: int | None
) -> None:
    choice = choose(text_of(size), given, cores=1, has_bfloat16=True)
    assert choice.settings.get("ngram_buckets") == rows
    is_chosen = rows is not None and "ngram_buckets" not in given
    assert ("rows of n-grams" in choice.note) == is_chosen


def test_a_slower_machine_reads_less() -> None:
    def dropout(cores: int, *, has_bfloat16: bool) -> float:
        given = {"minutes": 5.0}
        choice = choose(text_of(1.1e6), given, cores=cores, has_bfloat16=has_bfloat16)
        return float(choice.settings["dropout"])

    assert dropout(2, has_bfloat16=True) == dropout(4, has_bfloat16=False) == 0.1
    assert dropout(1, has_bfloat16=False) == 0.0
    assert dropout(64, has_bfloat16=True) == dropout(4, has_bfloat16=True) == 0.2


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_text_is_measured_as_it_is_split(kind: str, text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_text() + "§" * 99
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(text[i * 900 : (i + 1) * 900])
    (folder / "copy.txt").write_text(text[:900])
    (tmp_path / "end.txt").write_text(text[-2000:])
    for source, options in (
        (folder, {}),
        (text_file, {}),
        ([text[:3000], text[3000:]], {}),
        (f"1:{text_file},2:{tmp_path}/end.txt", {}),
        (text_file, {"val_file": str(tmp_path / "end.txt")}),
    ):
        corpus = Corpus.open(prepare(source, kind, 0, options=ReadOptions(**options)))
        size = measure_text(source, ReadOptions(**options))
        for split, count in (
            (corpus.train, size.tokens(kind)),
            (corpus.val, size.val_tokens(kind)),
        ):
            exact = split.n_tokens - len(split.doc_bytes)
            # where a document is cut, its bytes count as even as its characters
            assert count == (exact if kind == "char" else pytest.approx(exact, rel=0.05))
    size = TextSize.of_corpus(corpus)
    assert (size.tokens("byte"), size.val_tokens(kind)) == tuple(corpus.identity["split"])


def test_a_run_stores_what_was_chosen_and_a_resume_keeps_it(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text_file.read_text()[:20_000])
    run = mmrec.train("book.txt", preset="auto", steps=3, seq_len=64, out="run", **SIZES)
    config = tomllib.loads(Path("run/config.toml").read_text())
    assert config["preset"] == "tiny"
    assert (config["data"]["tokenizer"], config["data"]["seq_len"]) == ("char", 64)
    assert config["model"]["dropout"] == 0.0
    assert config["length"] == {"steps": 3}
    monkeypatch.setattr(auto, "choose", lambda *a, **k: pytest.fail("it chooses anew"))
    longer = mmrec.train(resume="run", steps=4, progress=False)
    after = tomllib.loads(Path("run/config.toml").read_text())
    assert after == config | {"length": {"steps": 4}}
    assert longer.metrics[:3] == run.metrics[:3]


def test_documents_a_file_and_a_corpus_are_chosen_for(text_file: Path, tmp_path: Path) -> None:
    given = {"minutes": 0.1, "seq_len": 64, "from_scratch": True}
    config = tmp_path / "auto.toml"
    config.write_text('preset = "auto"\n[optimizer]\nweight_decay = 0.5\n')
    text = text_file.read_text()
    plans = [
        plan_run("auto", None, given | {"data": str(text_file)}),
        plan_run("auto", None, given | {"data": "documents"}, documents=iter([text])),
        plan_run(None, config, given | {"data": str(text_file)}),
    ]
    assert {plan.preset for plan in plans} == {"tiny"}
    assert len({plan.model for plan in plans}) == 1
    assert plans[0].train.data.tokenizer == "char"
    assert list(plans[1].documents or []) == [text]  # an iterator is not used up
    assert plans[2].train.optimizer.weight_decay == 0.5
    path = prepare(text_file, "bpe", 300, tmp_path / "corpus.h5")
    plan = plan_run("auto", None, given | {"data": str(path)})
    assert plan.model.max_ngram == 3  # that of bpe
    assert "the vocabulary of its corpus" in plan.note


def test_too_small_a_text_is_told_with_its_size() -> None:
    for size, words in (
        (4000, "auto needs 4,097 characters of training text, one batch .*; book.txt has 3,600"),
        (0, "auto needs 4,097 characters of training text"),
    ):
        with pytest.raises(InputError, match=words):
            choose(text_of(size), {}, cores=1, has_bfloat16=True)
    small = TextSize("book.txt", 9000, 9000, 100, 100)
    with pytest.raises(
        InputError, match="257 characters of validation text, one window .* has 100"
    ):
        choose(small, {}, cores=1, has_bfloat16=True)
    choose(text_of(4000), {"batch_size": 2, "seq_len": 64}, cores=1, has_bfloat16=True)


def test_what_is_chosen_are_settings() -> None:
    choice = choose(text_of(1e5), {}, cores=1, has_bfloat16=True)
    assert choice.settings.keys() <= {*TRAIN_SETTINGS, *MODEL_SETTINGS}
    assert auto.STRONG_EPOCHS > DEFAULT_EPOCHS
