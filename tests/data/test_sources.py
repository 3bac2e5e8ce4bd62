"""Where text comes from: names and paths as users write them."""

import os
import sys
from pathlib import Path

import pytest

from mmrec.data.corpus import Corpus, cache_folder
from mmrec.data.prepare import corpus_tokenizer_kind, prepare
from mmrec.data.sources import iter_documents, parse_mixture
from mmrec.errors import InputError
from mmrec.training.setup import default_run_dir

posix = pytest.mark.skipif(sys.platform != "linux", reason="names of bytes, and links")
LATIN_1 = os.fsdecode(b"caf\xe9.txt")
"""A file name that is not UTF-8."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    """Write files whose text is their name."""
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name!a}")


def read(source: str) -> list[str]:
    """The names of the documents of a source."""
    return [document.name for document in iter_documents(source)]


@pytest.mark.parametrize(
    "name",
    [
        "~notes.txt",
        "~nosuchuser/x.txt",
        "[b.txt",
        "a]b[.txt",
        "12:30 talk.txt",
        "3:a,1:b",
        "notes,2.txt",
        "x\ny.txt",
        "**.txt",
        "$HOME.txt",
        "%s",
        " ",
        "日本😀.txt",
        "n" * 251 + ".txt",
    ],
)
def test_a_file_that_exists_is_read_whatever_its_name_means_elsewhere(
    name: str, here: Path
) -> None:
    write(name)
    assert parse_mixture(name) == [(1.0, name)]
    assert read(name) == [name]
    text = Path(name).read_text() + " and of more words" * 20
    Path(name).write_text(text)
    corpus = Corpus.open(prepare(name, "byte"))
    assert corpus.info["source"] == name
    assert corpus.train.n_bytes + corpus.val.n_bytes == len(text.encode())
    default_run_dir("medium", name).mkdir(parents=True)


@posix
def test_names_that_are_not_utf8_are_prepared(here: Path) -> None:
    write(f"folder/{LATIN_1}", "folder/b.txt")
    for source in ("folder", "folder/*", f"folder/{LATIN_1}"):
        text = "some text to split in two. " * 30
        Path(f"folder/{LATIN_1}").write_text(text)
        corpus = Corpus.open(prepare(source, "byte"))
        assert f"folder/{LATIN_1}" in [entry["name"] for entry in corpus.info["longest"]]
    out = here / f"{LATIN_1}.h5"
    assert Corpus.open(prepare(f"folder/{LATIN_1}", "byte", out=out)).path == out


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("f/*.txt", ["f/a.txt", "f/b.txt"]),
        ("f/**.txt", ["f/a.txt", "f/b.txt"]),
        ("f/**/*.txt", ["f/a.txt", "f/b.txt", "f/g/c.txt", "f/g/h/d.txt"]),
        ("f/**/h/*.txt", ["f/g/h/d.txt"]),
        ("f/**/**/d.txt", ["f/g/h/d.txt"]),
        ("**/c.txt", ["f/g/c.txt"]),
        ("f/g/**", ["f/g/c.txt", "f/g/e", "f/g/h/d.txt"]),
        ("f/g/*", ["f/g/c.txt", "f/g/e"]),
        ("f/[ab].txt", ["f/a.txt", "f/b.txt"]),
        ("f/g/../?.txt", ["f/g/../a.txt", "f/g/../b.txt"]),
        ("f/.*.txt", ["f/.hidden.txt"]),
        ("f", ["f/a.txt", "f/b.txt", "f/g/c.txt", "f/g/h/d.txt"]),
    ],
)
def test_globs_match_as_in_a_shell(pattern: str, found: list[str], here: Path) -> None:
    write("f/a.txt", "f/b.txt", "f/.hidden.txt", "f/g/c.txt", "f/g/e", "f/g/h/d.txt", "f/.x/y.txt")
    assert read(pattern) == found
    assert read(str(here / pattern)) == [str(here / name) for name in found]


@posix
def test_links_to_folders_are_followed_without_loops(here: Path) -> None:
    write("far/a.txt", "folder/z/b.txt", "up.txt")
    Path("folder/alias").symlink_to("z")  # there already, under its own name
    Path("folder/far").symlink_to("../far")
    Path("folder/again").symlink_to("../far")
    Path("folder/z/loop").symlink_to("..")
    Path("folder/z/root").symlink_to("../..")
    assert read("folder") == ["folder/again/a.txt", "folder/z/b.txt"]
    assert read("folder/**/*.txt") == ["folder/again/a.txt", "folder/z/b.txt"]
    Path("folder/lost.txt").symlink_to("nothing")
    for source in ("folder", "folder/*.txt", "folder/lost.txt"):
        with pytest.raises(InputError, match="lost.txt: (N|n)o such file"):
            read(source)


@pytest.mark.parametrize(
    ("mixture", "components"),
    [
        ("3:a,1:b", [(3.0, "a"), (1.0, "b")]),
        ("3:a, 1:b", [(3.0, "a"), (1.0, "b")]),
        (" 0.5: a ,\n.25:b c", [(0.5, "a"), (0.25, "b c")]),
        ("3:a,b.txt,1:c", [(3.0, "a,b.txt"), (1.0, "c")]),
        ("2:a", [(2.0, "a")]),
        ("a,b", [(1.0, "a,b")]),
        ("a,1:b", [(1.0, "a,1:b")]),
        ("3:" + "a" * 300 + ",1:b", [(3.0, "a" * 300), (1.0, "b")]),
    ],
)
def test_mixtures(mixture: str, components: list[tuple[float, str]]) -> None:
    assert parse_mixture(mixture) == components


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a,b", "no data at a,b: .*; a mixture is written .* 3:code/,1:book.txt"),
        ("3:a,1:b", "no data at 3:a,1:b: a mixture is for training text; here one source is read"),
        ("~nosuchuser/x", "no data at ~nosuchuser/x: no such file or folder"),
        ("fold*", r"no file matches fold\*; it matches folders: end it with /\*\*"),
        ("none*", r"no file matches none\*$"),
        ("x" * 300 + ".txt", "cannot read x+…x+.txt: File name too long"),
        ("a/\0", r"no data at a/\\x00: no such file or folder"),
        ("/dev/null", "/dev/null must be a file, a folder or a pipe; it is a device"),
    ],
)
def test_sources_that_are_none(source: str, message: str, here: Path) -> None:
    Path("folder").mkdir()
    with pytest.raises(InputError, match=message):
        read(source)


def test_a_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("book.txt")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    assert read("~/book.txt") == [str(here / "book.txt")]
    assert read("~/*.txt") == [str(here / "book.txt")]
    Path("book.txt").write_text("words " * 50)
    corpus = prepare("book.txt", "byte", out=here / "book.h5")
    assert prepare("~/book.h5") == corpus
    assert corpus_tokenizer_kind("~/book.h5", "bpe") == "byte"
    monkeypatch.setenv("MMREC_CACHE", "~/cache")
    assert cache_folder() == here / "cache" / "corpora"


def test_a_mixture_with_a_corpus_file_is_refused_by_that_name(here: Path) -> None:
    write("a.txt")
    assert corpus_tokenizer_kind("3:a.txt,1:b.h5", "bpe") == "bpe"
    with pytest.raises(InputError, match="a mixture must be of texts"):
        prepare("3:a.txt,1:b.h5")


def test_without_a_home_the_variable_that_helps_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platformdirs

    def no_home(*arguments: object) -> str:
        raise RuntimeError("could not determine the home directory")

    write("book.txt")
    monkeypatch.delenv("MMREC_CACHE")
    for older_or_newer in (lambda *arguments: "~/.cache/mmrec", no_home):
        monkeypatch.setattr(platformdirs, "user_cache_dir", older_or_newer)
        monkeypatch.setattr(Path, "expanduser", no_home)
        with pytest.raises(InputError, match="this user has no home: set MMREC_CACHE to a folder"):
            prepare("book.txt", "byte")
    assert not Path("~").exists()


def test_a_cache_that_cannot_be_written_is_found_before_the_text_is_read(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("file")
    for folder in ("file", "file/below"):
        monkeypatch.setenv("MMREC_CACHE", folder)
        with pytest.raises(InputError, match="cannot make the folder .*; set MMREC_CACHE to a"):
            prepare("none.txt", "byte")
    monkeypatch.setenv("MMREC_CACHE", "cache")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="folder cache.corpora cannot be written; set MMREC_CACHE"):
        prepare("none.txt", "byte")


@pytest.mark.parametrize("length", [1, 100, 246, 251])
def test_a_corpus_file_may_have_any_name_that_the_system_allows(length: int, here: Path) -> None:
    write("book.txt")
    Path("book.txt").write_text("words " * 500)
    out = here / ("n" * length + ".h5")
    assert Corpus.open(prepare("book.txt", "byte", out=out, shard_chars=500)).path == out
    assert sorted(p.name for p in here.iterdir()) == sorted([out.name, "book.txt"])
