"""Standard input, output and error: any encoding, closed, full, and text that is not UTF-8."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrec.checkpoint.checkpoint import save_checkpoint
from mmrec.cli import main
from mmrec.cli.streams import print_json
from mmrec.data.tokenizer import KINDS, train_tokenizer
from mmrec.model import Model
from tests.conftest import SMALL

needs_shell = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
TEXT = "日本é"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each tokenizer, called byte.h5, char.h5 and bpe.h5."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        tokenizer = train_tokenizer(kind, ["abc" + TEXT], 257)
        save_checkpoint(folder / f"{kind}.h5", Model(SMALL), tokenizer, 1, {})
    return folder


def run(
    patch: pytest.MonkeyPatch,
    *arguments: str,
    encoding: str = "utf-8",
    given: bytes = b"",
) -> tuple[int, bytes, str]:
    """Run a command in this process; return its code, standard output and standard error."""
    streams = [io.TextIOWrapper(io.BytesIO(data), encoding) for data in (given, b"", b"")]
    for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
        patch.setattr(sys, name, stream)
    patch.setattr(sys, "argv", ["mmrec", *arguments])
    with pytest.raises(SystemExit) as caught:
        main.run()
    out, err = (stream.buffer.getvalue() for stream in streams[1:])  # type: ignore[attr-defined]
    return int(caught.value.code or 0), out, err.decode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_not_utf8(
    kind: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rule for every tokenizer, and for arguments as for standard input."""
    command = ["generate", str(models / f"{kind}.h5")]
    rule = "must be UTF-8 text; byte 0xff at offset 1 is not\n"
    prompt = b"a\xffc".decode("utf-8", "surrogateescape")  # as Python decodes an argument
    for arguments, given, name in (
        (["--prompt", prompt], b"", "--prompt"),
        (["--prompt", "a", "--stop", prompt], b"", "--stop"),
        (["--prompt", "-"], b"a\xffc", "standard input"),
        ([], b"a\xffc", "standard input"),
    ):
        code, out, err = run(monkeypatch, *command, *arguments, given=given)
        assert (code, out, err) == (2, b"", f"error: {name} {rule}")


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", "日本é".encode()),
        ("ascii", "日本é".encode()),  # which Python takes where nobody chose an encoding
        ("latin-1", b"\\u65e5\\u672c\xe9"),
        ("cp1252", b"\\u65e5\\u672c\xe9"),
    ],
)
def test_a_prompt_in_every_encoding(
    encoding: str, printed: bytes, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard input is UTF-8 whatever the encoding of the locale; output is in that encoding."""
    command = ["generate", "--model", str(models / "bpe.h5"), "--max-tokens", "0"]
    in_ascii_locale = TEXT.encode().decode("ascii", "surrogateescape")
    for arguments, given in (
        (["--prompt", TEXT], b""),
        (["--prompt", in_ascii_locale], b""),
        ([], TEXT.encode()),
        ([], b"\xef\xbb\xbf" + TEXT.encode()),
    ):
        code, out, err = run(monkeypatch, *command, *arguments, encoding=encoding, given=given)
        assert (code, out.replace(b"\r", b""), err) == (0, printed + b"\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_help_and_errors_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(monkeypatch, "train", "--help", encoding=encoding)
    assert (code, err) == (0, "")
    out.decode("utf-8" if encoding == "ascii" else encoding)
    code, out, err = run(monkeypatch, "日", encoding=encoding)
    word = "日" if encoding == "ascii" else "\\u65e5"
    assert (code, err) == (2, f"error: No such command '{word}' (see mmrec --help)\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_json_is_valid_in_every_encoding(
    encoding: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(TEXT, encoding="utf-8")
    arguments = f"eval {models / 'bpe.h5'} --prompts {prompts} --json --temperatures 0"
    code, out, _ = run(monkeypatch, *arguments.split(), "--max-tokens", "1", encoding=encoding)
    assert code == 0
    [sample] = json.loads(out.decode("ascii"))
    assert sample["prompt"] == TEXT


def test_json_has_null_for_numbers_that_are_not_finite(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_json({"a": math.nan, "b": [1.5, -math.inf], "c": (None, "x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [None, "x"]}


def shell(command: str, *, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which ``$MMREC`` is the program."""
    environment = os.environ | {"MMREC": f"{sys.executable} -m mmrec"}
    environment |= {"PYTHONUNBUFFERED": "1" * unbuffered}
    return subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )


@needs_shell
def test_closed_streams(models: Path) -> None:
    """No file takes the number of a closed stream; nothing is said but what was asked for."""
    generate = f"$MMREC generate {models / 'byte.h5'} --max-tokens 0"
    assert (shell(f"{generate} --prompt x 2>&- <&-").stdout) == "x\n"
    ended = shell(f"{generate} --prompt x >&- 2>&- <&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    code = (
        "from mmrec.cli.streams import standard_streams; import os\n"
        "with standard_streams(): assert os.open(os.devnull, os.O_RDONLY) > 2"
    )
    assert shell(f'{sys.executable} -c "{code}" >&- <&-').stderr == ""


@needs_full
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_disk(unbuffered: bool) -> None:
    for command in ("--version", "train -h"):
        ended = shell(f"$MMREC {command} >/dev/full", unbuffered=unbuffered)
        error = "error: cannot write standard output: No space left on device\n"
        assert (ended.returncode, ended.stderr) == (2, error)
    assert shell("$MMREC nothing 2>/dev/full", unbuffered=unbuffered).returncode == 2


@needs_shell
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_has_gone(unbuffered: bool) -> None:
    """The pipe is closed before anything is written."""
    line = "{ sleep 0.1; $MMREC train -h; echo $? >&2; } | true"
    assert shell(line, unbuffered=unbuffered).stderr == "0\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_generated_bytes_that_are_not_utf8(
    encoding: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new byte model writes bytes at random. Each wrong one is printed as U+FFFD."""
    options = "--max-tokens 40 --seed 1 --prompt a --temperature 5 --top-p 1"
    arguments = ["generate", str(models / "byte.h5"), *options.split()]
    code, out, err = run(monkeypatch, *arguments, encoding=encoding)
    assert (code, err) == (0, "")
    if encoding == "cp1252":
        assert r"\ufffd" in out.decode("cp1252")
    else:
        assert "\ufffd" in out.decode()
