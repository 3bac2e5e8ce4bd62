"""Sessions: a text and its state, saved, restored, forked and interrupted."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mmrec.checkpoint.hdf5 import seal
from mmrec.config import ModelConfig
from mmrec.data.readers import ReadOptions
from mmrec.data.tokenizer import train_tokenizer
from mmrec.errors import InputError
from mmrec.inference import session as session_module
from mmrec.inference.decoder import Decoder
from mmrec.inference.neural_cache import CachingDecoder
from mmrec.inference.session import Session
from mmrec.model import Model
from tests.conftest import SMALL

TEXT = "def read(self):\n    return 1\n"


def make_decoder(kind: str = "byte", seed: int = 0, neural_cache: int | None = None) -> Decoder:
    """A random model of a small shape; n-grams are on, so that recent tokens count."""
    tokenizer = train_tokenizer(kind, [TEXT * 3], 270)
    torch.manual_seed(seed)
    shape = SMALL.__dict__ | {"vocab_size": tokenizer.vocab_size, "ngram_buckets": 64}
    model = Model(ModelConfig(**shape)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    if neural_cache is None:
        return Decoder.from_model(model, tokenizer)
    return CachingDecoder.from_model(model, tokenizer, neural_cache=neural_cache)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def text_of(session: Session, **settings: object) -> str:
    return "".join(session.generate(max_tokens=20, **({"seed": 1} | settings)))  # type: ignore[arg-type]


def assert_same_state(a: Session, b: Session) -> None:
    assert (a.state.values == b.state.values).all()
    assert (a.state.recent == b.state.recent).all()
    assert (a.length, a.text) == (b.length, b.text)


def test_a_saved_session_continues_with_the_same_bits(decoder: Decoder, tmp_path: Path) -> None:
    session = Session(decoder)
    session.read(TEXT)
    text_of(session)
    session.save(tmp_path / "one.h5")
    assert (tmp_path / "one.h5").stat().st_size < 4 * decoder.state_size + 16_000
    loaded = Session.load(tmp_path / "one.h5", decoder)
    assert_same_state(loaded, session)
    assert text_of(loaded, seed=2) == text_of(session, seed=2)
    assert_same_state(loaded, session)


def test_forks_are_independent(decoder: Decoder) -> None:
    session = Session(decoder)
    session.read(TEXT)
    fork, other = session.fork(), session.fork()
    first = text_of(fork, seed=1)
    assert first != text_of(other, seed=2)
    assert (session.text, session.length) == (TEXT, len(TEXT))
    assert (fork.text, text_of(session, seed=1)) == (TEXT + first, first)
    assert_same_state(fork, session)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_a_file_read_in_pieces_is_its_text(kind: str, tmp_path: Path) -> None:
    decoder = make_decoder(kind)
    path, text = tmp_path / "text.txt", TEXT * 5
    path.write_text(f"{text}<|endoftext|>{TEXT}")
    read, counts = Session(decoder), list[int]()
    options = ReadOptions(piece_chars=40, chunk_bytes=30)
    read.read(path, options=options, progress=counts.append)
    whole = Session(decoder)
    tokenizer = decoder.tokenizer
    tokens = [*tokenizer.encode(text), tokenizer.eot, *tokenizer.encode(TEXT)]
    decoder.read(whole.state, tokens)
    assert (read.state.values == whole.state.values).all()
    assert (read.state.recent == whole.state.recent).all()
    assert read.length == sum(counts) == len(tokens)
    assert read.text == text + TEXT


def test_an_interrupt_while_reading_changes_nothing(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "READ_CHUNK", 10)
    session, counts = Session(decoder), list[int]()
    session.read("some ")
    before = session.fork()

    def stop(count: int) -> None:
        counts.append(count)
        if len(counts) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read(TEXT, progress=stop)
    assert counts == [10, 10]
    assert_same_state(session, before)


def test_a_generation_that_is_closed_leaves_the_text_that_was_written(decoder: Decoder) -> None:
    session = Session(decoder)
    session.read(TEXT)
    pieces = session.generate(max_tokens=100_000, seed=1)
    shown = next(pieces) + next(pieces)
    pieces.close()
    completion = session.completion
    assert completion is not None
    assert completion.finish_reason == "cancelled"
    assert completion.text.startswith(shown)
    again = Session(decoder)
    decoder.read(again.state, [*TEXT.encode(), *completion.tokens])
    assert (again.state.values == session.state.values).all()
    assert session.length == len(TEXT) + len(completion.tokens)
    assert session.text == TEXT + completion.text


def test_only_the_newest_text_is_kept(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "TEXT_BYTES", 10)
    session = Session(decoder)
    session.read("öffnen")
    assert session.text == "öffnen"
    session.read("ÄÖÜ")
    assert session.text == "fnenÄÖÜ"  # 10 bytes
    session.read("€€€€")
    assert session.text == "€€€"  # 9 bytes: no part of a character
    assert session.length == len("öffnenÄÖÜ€€€€".encode())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be finite and >= 0; got -1"),
        ({"tempo": 1}, "unknown setting 'tempo'"),
        ({"max_tokens": -1}, "max_tokens must be >= 0; got -1"),
    ],
)
def test_a_wrong_setting_is_refused_by_the_call(
    decoder: Decoder, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Session(decoder).generate(**settings)  # type: ignore[arg-type]


def test_an_unknown_character_changes_nothing() -> None:
    session = Session(make_decoder("char"))
    session.read("def")
    before = session.fork()
    with pytest.raises(InputError, match="'☃' .* is not among the"):
        session.read("read ☃")
    assert_same_state(session, before)


def test_a_session_of_another_model_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    Session(decoder).save(tmp_path / "one.h5")
    with pytest.raises(InputError, match=r"one.h5 must be a session of .*; it is of another model"):
        Session.load(tmp_path / "one.h5", make_decoder(seed=1))


def test_a_damaged_session_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "one.h5"
    session = Session(decoder)
    session.read(TEXT * 3)
    session.save(path)
    good = path.read_bytes()
    for at in range(0, len(good), 997):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        if at < 512 and good[at] == 0:  # the seal's padding; a changed byte there breaks it, too
            continue
        with pytest.raises(InputError, match="one.h5 ") as caught:
            Session.load(path, decoder)
        assert "\n" not in str(caught.value)
    path.write_bytes(good[:5000])
    with pytest.raises(InputError, match=r"session .*one.h5 is damaged or truncated"):
        Session.load(path, decoder)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("state", np.full(3, 0, np.float32), "state must be float32 "),
        ("state", None, "state is missing"),
        ("recent_tokens", np.full(256, 257), "recent_tokens must hold token ids"),
        ("recent_tokens", np.full(256, -1), "recent_tokens must hold token ids"),
        ("text", np.zeros(70_000, np.uint8), "length or text is out of its range"),
    ],
)
def test_a_forged_session_is_refused(
    decoder: Decoder, tmp_path: Path, name: str, values: np.ndarray | None, message: str
) -> None:
    from mmrec.checkpoint.hdf5 import write_array

    path = tmp_path / "one.h5"
    Session(decoder).save(path)
    with h5py.File(path, "a") as file:
        del file[name]
        if values is not None:
            write_array(file, name, values)
    seal(path)
    with pytest.raises(InputError, match=message):
        Session.load(path, decoder)


def test_what_may_be_overwritten(decoder: Decoder, tmp_path: Path) -> None:
    path, mine = tmp_path / "one.h5", tmp_path / "mine.json"
    Session(decoder).save(path)
    session = Session(decoder)
    session.read(TEXT)
    session.save(path)  # a session replaces a session
    assert Session.load(path, decoder).text == TEXT
    mine.write_text(json.dumps({"mine": 1}))
    with pytest.raises(InputError, match=r"mine.json is there already, and mmrec wrote no session"):
        session.save(mine)
    assert json.loads(mine.read_text()) == {"mine": 1}
    with pytest.raises(InputError, match="there is no folder"):
        session.save(tmp_path / "none" / "x.h5")


def test_what_is_read_must_be_text_or_a_file(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text must be of type str or Path; got 3"):
        Session(decoder).read(3)  # type: ignore[arg-type]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"empty.txt is empty: expected text"):
        Session(decoder).read(tmp_path / "empty.txt")
