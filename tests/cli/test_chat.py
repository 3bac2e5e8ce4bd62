"""``mmrec chat``: turns, undo and edits in this process; a terminal and Ctrl-C in a real one."""

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmrec.cli import main
from mmrec.cli.chat import COMMANDS, SAMPLING, Chat
from mmrec.errors import InputError
from mmrec.inference.chat import ChatSession
from mmrec.inference.session import Session
from tests.conversations import message
from tests.inference.test_chat import make_chat_decoder
from tests.inference.test_session import make_decoder


@pytest.fixture
def chat() -> Chat:
    return Chat(Session(make_decoder()), max_tokens=12, seed=1)


def answer(chat: Chat, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a line prints on standard output."""
    capsys.readouterr()
    chat.take(line)
    return capsys.readouterr().out


def test_the_model_continues_what_is_written(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    first = answer(chat, "def read", capsys)
    second = answer(chat, "", capsys)  # goes on
    want = Session(chat.session.decoder)
    want.read("def read")
    texts = ["".join(want.generate(max_tokens=12, seed=1)) for _ in range(2)]
    assert [turn.answer for turn in chat.turns] == texts
    assert [first, second] == [text + "\n" * (not text.endswith("\n")) for text in texts]
    assert chat.session.text == want.text


def test_undo_is_exact(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("def ")
    before = chat.session.fork()
    want = answer(chat, "return", capsys)
    chat.take("/undo")
    assert (chat.session.state.values == before.state.values).all()
    assert (chat.session.state.recent == before.state.recent).all()
    assert (chat.session.text, chat.session.length) == (before.text, before.length)
    chat.take("something else")
    chat.take("/undo")
    assert answer(chat, "return", capsys) == want
    chat.take("/undo")
    chat.take("/undo")
    assert chat.session.length == 0
    with pytest.raises(InputError, match="nothing to undo"):
        chat.take("/undo")


def test_a_message_is_sent_again(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("def ")
    first = answer(chat, "return", capsys)
    assert answer(chat, "/retry", capsys) != first
    assert [turn.seed for turn in chat.turns] == [1, 2]
    assert [turn.message for turn in chat.turns] == ["def ", "return"]
    assert answer(chat, "/edit return", capsys) == first
    assert answer(chat, "/edit  two spaces", capsys)
    assert [turn.message for turn in chat.turns] == ["def ", " two spaces"]
    assert chat.session.text.endswith(" two spaces" + chat.turns[-1].answer)
    chat.take("/seed random")
    seeds = set()
    for _ in range(3):
        chat.take("/retry")
        seeds.add(chat.turns[-1].seed)
    assert len(seeds) == 3


def test_an_edited_line_replaces_the_message(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal /edit lets the next line begin with the message."""
    monkeypatch.setattr(
        sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})()
    )
    chat.take("//slash")
    assert chat.turns[0].message == "/slash"
    chat.take("/edit")
    assert chat.draft == "//slash"
    chat.take("//slash!")
    assert ([turn.message for turn in chat.turns], chat.draft) == (["/slash!"], None)


@pytest.fixture
def talk() -> Chat:
    """A chat with a model that has a template."""
    return Chat(ChatSession(make_chat_decoder(), "Be kind."), max_tokens=12, seed=1)


def messages_of(chat: Chat) -> list[dict[str, str]]:
    assert isinstance(chat.session, ChatSession)
    return chat.session.messages


def test_a_model_with_a_template_answers(talk: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    """/undo, /edit, /retry and /new stand for messages, and the message of the system stays."""
    system = message("system", "Be kind.")
    first = answer(talk, "return", capsys).removesuffix("\n")
    said = [system, message("user", "return"), message("assistant", talk.turns[0].answer)]
    assert messages_of(talk) == said
    assert talk.turns[0].answer.removesuffix("\n") == first
    answer(talk, "more", capsys)
    assert len(messages_of(talk)) == 5
    talk.take("/undo")
    assert messages_of(talk) == said
    talk.take("/retry")
    assert messages_of(talk)[1] == said[1]
    assert messages_of(talk)[2] != said[2]
    talk.take("/edit def read")
    assert messages_of(talk)[1] == message("user", "def read")
    assert [turn.message for turn in talk.turns] == ["def read"]
    shown = answer(talk, "/history", capsys)
    assert shown.startswith("system: Be kind.\n> def read\n")
    talk.take("/new")
    assert messages_of(talk) == [system]
    with pytest.raises(InputError, match="there is no answer to go on with"):
        talk.take("")
    assert messages_of(talk) == [system]
    assert "The model answers your messages." in answer(talk, "/help", capsys)


def test_a_cut_answer_goes_on_with_an_empty_line(
    talk: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.take("return")
    assert "an empty line goes on with it" in capsys.readouterr().err
    talk.take("")
    [_, user, answered] = messages_of(talk)
    assert user == message("user", "return")
    assert answered["content"] == talk.turns[0].answer + talk.turns[1].answer


def test_a_saved_chat_is_loaded(
    talk: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    talk.take("return")
    said = list(messages_of(talk))
    talk.take("/save one")
    talk.take("/new")
    assert "user: return\n" in answer(talk, "/load one", capsys)
    assert messages_of(talk) == said


def test_saved_and_loaded(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chat.take("def ")
    text = chat.session.text
    chat.take("/save one")
    assert Path("one.h5").is_file()
    want = answer(chat, "return", capsys)
    assert text in answer(chat, "/load one", capsys)
    assert chat.session.text == text
    assert answer(chat, "return", capsys) == want
    chat.take("/new")
    assert chat.session.length == 0
    with pytest.raises(InputError, match="no message to send again"):
        chat.take("/retry")
    for _ in range(3):
        chat.take("/undo")  # /new, the second return, and /load
    assert chat.turns[-1].message == "return"
    Path("mine.h5").write_text("mine")
    with pytest.raises(InputError, match=r"mine.h5 is there already.*: choose another NAME$"):
        chat.take("/save mine")
    assert Path("mine.h5").read_text() == "mine"


def test_settings_change_the_answers(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    first = answer(chat, "def ", capsys)
    chat.take("/temperature 0")
    greedy = answer(chat, "/edit def ", capsys)
    assert greedy != first
    chat.take("/temperature 5")
    chat.take("/top-k 1")
    assert answer(chat, "/edit def ", capsys) == greedy
    chat.take("/max-tokens 3")
    chat.take("/retry")
    assert len(chat.turns[-1].answer.encode()) <= 3 * 3  # bytes that are no character are U+FFFD
    assert chat.session.length == len("def ") + 3
    capsys.readouterr()
    chat.take("/settings")
    told = dict(line.split() for line in capsys.readouterr().err.splitlines())
    assert told.keys() == {s.flag[2:] for s in SAMPLING.values()} | {"seed", "max-tokens"}
    assert (told["temperature"], told["top-k"], told["max-tokens"]) == ("5", "1", "3")


def test_history_and_help(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.take("def ")
    chat.take("return")
    text = answer(chat, "/history", capsys)
    assert text.index("> def ") < text.index("> return")
    assert all(turn.answer in text for turn in chat.turns)
    told = answer(chat, "/help", capsys)
    assert all(f"/{name}" in told for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/und", r"unknown command '/und'; did you mean '/undo'\? \(/help lists them"),
        ("/", "unknown command '/'"),
        ("/undo 2", "/undo takes nothing after it; got '2'"),
        ("/temperature x", "temperature must be a number; got 'x'"),
        ("/top-k 1.5", "top_k must be a whole number; got '1.5'"),
        ("/top_p 2", r"top_p must lie in \(0, 1\]; got 2"),
        ("/seed -1", "seed must be .*; got -1"),
        ("/seed x", "seed must be a whole number, or random; got 'x'"),
        ("/max-tokens -1", "max-tokens must be a whole number >= 0; got '-1'"),
        ("/save", "/save needs a name, such as /save story"),
        ("/load none", "no session at none.h5: no such file"),
        ("/edit", "/edit needs the new text after it, as this is no terminal"),
        ("/edit ☃", "the character '☃'"),
        ("a ☃", "the character '☃' .* is not among the"),
    ],
)
def test_a_mistake_changes_nothing(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    chat = Chat(Session(make_decoder("char")), max_tokens=5, seed=1)
    chat.take("def ")
    before, settings, turns = chat.session.fork(), dict(vars(chat)), list(chat.turns)
    with pytest.raises(InputError, match=message) as caught:
        chat.take(line)
    assert "\n" not in str(caught.value)
    assert (chat.session.state.values == before.state.values).all()
    assert chat.session.text == before.text
    assert (vars(chat), chat.turns) == (settings, turns)


# ---- the command


def piped(
    char_run: Path,
    lines: bytes,
    patch: pytest.MonkeyPatch,
    *options: str,
    folder: Path | None = None,
) -> int:
    """Run the command with its standard input from a pipe; return its exit code."""
    patch.chdir(folder or char_run.parent)
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    patch.setattr(sys, "argv", ["mmrec", "chat", str(char_run), "--max-tokens", "20", *options])
    with pytest.raises(SystemExit) as caught:
        main.run()
    return int(caught.value.code or 0)


def test_through_a_pipe(
    char_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = b"It was\\\nthe best\n/undo\nIt was\\\nthe best\r\n/save one\n/quit\nnot read"
    assert piped(char_run, lines, monkeypatch, "--seed", "1", folder=tmp_path) == 0
    out, err = capsys.readouterr()
    assert out[: len(out) // 2] == out[len(out) // 2 :] != ""
    assert "undone: 'It was\\nthe best'" in err
    assert err.count("saved") == 1
    state = ("--state", "one.h5", "--seed", "2")
    assert piped(char_run, b"/history\nof", monkeypatch, *state, folder=tmp_path) == 0
    assert capsys.readouterr().out.startswith("It was\nthe best")


def test_mistakes_in_a_pipe_are_told_at_the_end(
    char_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(char_run, b"It\n/nothing\n\xff\nwas", monkeypatch, "--temperature", "0") == 2
    out, err = capsys.readouterr()
    assert "error: unknown command '/nothing'" in err
    assert "error: the message must be UTF-8 text; byte 0xff" in err
    assert len(out) > 40  # both messages were continued


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


class Terminal:
    """A chat in a process of its own, at a terminal."""

    def __init__(self, char_run: Path, *options: str) -> None:
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "mmrec", "chat", str(char_run), *options]
        environment = os.environ | {
            "TERM": "dumb",
            "NO_COLOR": "1",
            "MMREC_CACHE": str(char_run.parent / "cache"),
        }
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.screen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until some text is on the screen; return all that came, and forget it."""
        self._read_until(lambda: text in self.screen, seconds)
        found, _, self.screen = self.screen.partition(text)
        return found + text

    def wait_for_output(self) -> None:
        """Read until there is more on the screen."""
        count = len(self.screen)
        self._read_until(lambda: len(self.screen) > count + 10, 60)

    def _read_until(self, is_done: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not is_done():
            assert time.monotonic() < end, self.screen
            if select.select([self.master], [], [], 0.1)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def press_ctrl_c(self) -> None:
        """Press it as late as people do.

        CPython's readline module does not see a signal that comes between its handling of a
        character and its wait for the next one, until another signal comes.
        """
        time.sleep(0.5)
        self.type("\x03")

    def end(self) -> int:
        return self.process.wait(30)


@pytest.fixture
def terminal(char_run: Path) -> Iterator[Terminal]:
    # a model that always takes the most likely token repeats itself without an end
    opened = Terminal(char_run, "--max-tokens", "1000000", "--seed", "1", "--temperature", "0")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.master)


@needs_terminal
def test_ctrl_c_stops_the_text_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    for _ in range(3):  # more often than what ends other commands
        terminal.type("It was\n")
        terminal.wait_for("It was\r\n")
        terminal.wait_for_output()
        terminal.type("\x03")  # the terminal sends SIGINT
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
    terminal.type("/history\n")
    history = terminal.wait_for("[3] seed 1")
    assert history.count("> It was") == 2
    terminal.type("/undo\n")
    terminal.wait_for("undone: 'It was'")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@needs_terminal
def test_ctrl_c_at_the_prompt(terminal: Terminal) -> None:
    """It clears a line; at an empty one it ends the chat at the second time."""
    terminal.wait_for("> ")
    for _ in range(2):
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.press_ctrl_c()
        assert "ends" not in terminal.wait_for("> ")
    terminal.press_ctrl_c()
    terminal.wait_for("(Ctrl-C again, or Ctrl-D, ends)")
    terminal.wait_for("> ")
    terminal.press_ctrl_c()
    assert terminal.end() == 128 + signal.SIGINT


@needs_terminal
def test_edit_at_the_terminal(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("/max-tokens 5\n")
    terminal.wait_for("max-tokens 5")
    terminal.type("it was\n")
    terminal.wait_for("it was\r\n")
    terminal.wait_for("> ")
    terminal.type("/edit\n")
    terminal.wait_for("> it was")
    terminal.type("\x01b")  # at the start of the line
    terminal.type("\n")
    terminal.wait_for("> ")
    terminal.type("/history\n")
    assert terminal.wait_for("[1] seed 1").count("[2]") == 0
    terminal.wait_for("> bit was")
