"""``mmrec chat``: write with a model at the terminal.

A model with a chat template answers messages. Any other continues what you write.
"""

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TextIO

import typer

from mmrec.cli.options import (
    MODEL_HELP,
    SEED_BOUNDS,
    ModelOption,
    ThreadsOption,
    WeightsOption,
    one_model,
    settings_options,
)
from mmrec.cli.streams import argument_text, decode_utf8
from mmrec.config import (
    DEFAULT_MAX_TOKENS,
    MAX_COUNT,
    TRAIN_SETTINGS,
    NeuralCacheConfig,
    SamplingConfig,
    Setting,
)
from mmrec.errors import InputError, did_you_mean
from mmrec.runtime.interrupts import note_interrupts, repeated_interrupts
from mmrec.runtime.names import printable, shorten, user_path

if TYPE_CHECKING:
    from mmrec.inference.decoder import Decoder
    from mmrec.inference.session import Session

try:
    import readline
except ImportError:  # on Windows, whose console has a history of its own
    readline = None  # type: ignore[assignment]

SAMPLING = SamplingConfig.settings()
NEURAL_CACHE = NeuralCacheConfig.settings()
SEED = TRAIN_SETTINGS["seed"]
MAX_SEED = int(SEED.maximum or 0)
SEED_BITS = 32
"""Of a seed that is drawn, so that it is easy to type."""
HISTORY_LINES = 1000
"""Lines that are kept of what was typed."""
SHOWN_CHARS = 1000
"""Characters that are shown of the end of a text."""


@settings_options([*SAMPLING, *NEURAL_CACHE], declared=SAMPLING | NEURAL_CACHE)
def chat(
    where: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]", help=MODEL_HELP),
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = "float32",
    threads: ThreadsOption = None,
    state: Annotated[
        Path | None, typer.Option(help="Begin with a session that /save wrote.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens per answer.", min=0, max=MAX_COUNT)
    ] = DEFAULT_MAX_TOKENS,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Message of the system, if the model has a template."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer at it; repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give equal answers.", **SEED_BOUNDS)
    ] = None,
    **sampling: Any,
) -> None:
    """Write in turns with a model, which answers or goes on with your text; /help tells how."""
    cache = NeuralCacheConfig(sampling.pop("neural_cache", 0))
    SamplingConfig(**sampling)
    from mmrec.checkpoint.manager import find_checkpoint
    from mmrec.inference.neural_cache import load_with_cache

    stop_texts = [argument_text(text, "--stop") for text in stop or ()]
    if not all(stop_texts):
        raise InputError("a stop text must not be empty")
    if system is not None:
        system = argument_text(system, "--system")
        if state is not None:
            raise InputError("--system has no effect with --state, which holds the chat so far")
    path = find_checkpoint(one_model(where, model))
    decoder = load_with_cache(path, cache.neural_cache, weights=weights, threads=threads)
    session = _begin_session(decoder, path, state, system)
    conversation = Chat(session, sampling, max_tokens=max_tokens, stop=stop_texts, seed=seed)
    if sys.stdin.isatty():
        manner = "answers" if conversation.is_chat else "continues"
        _note(f"{path}, step {decoder.step:,}. It {manner} what you write; /help tells the rest.")
        conversation.history()
    with repeated_interrupts(), _prompt_history():
        is_clean = _run(conversation)
    if not (is_clean or sys.stdin.isatty()):
        raise typer.Exit(2)


def _begin_session(
    decoder: "Decoder", path: Path, state: Path | None, system: str | None
) -> "Session":
    """A session in which the model answers, if it has a chat template, or continues."""
    if not decoder.tokenizer.chat_template:
        from mmrec.inference.session import Session

        if system is not None:
            raise InputError(f"--system has no effect: {path} has no chat template")
        return Session(decoder) if state is None else Session.load(state, decoder)
    from mmrec.inference.chat import ChatSession

    return ChatSession(decoder, system or "") if state is None else ChatSession.load(state, decoder)


def _run(conversation: "Chat") -> bool:
    """Take messages and commands to the end. Return whether there was no mistake among them."""
    is_clean, is_interrupted = True, False
    while not conversation.is_ended:
        try:
            line = _read_message(conversation.draft)
        except EOFError:
            if sys.stdin.isatty():
                print()
            return is_clean
        except KeyboardInterrupt as error:
            was_interrupted, is_interrupted = is_interrupted, not any(error.args)
            if not sys.stdin.isatty() or (was_interrupted and is_interrupted):
                raise
            conversation.draft = None
            _note("\n(Ctrl-C again, or Ctrl-D, ends)" if is_interrupted else "")
            continue
        except InputError as error:
            is_clean = False
            _complain(error)
            continue
        is_interrupted = False
        try:
            conversation.take(line)
        except InputError as error:
            is_clean = False
            _complain(error)
        except KeyboardInterrupt:
            _note("\n(stopped; nothing has changed)")
    return is_clean


def _complain(error: InputError) -> None:
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def _note(text: str) -> None:
    """Print a line that is not part of the text."""
    print(_styled(text, sys.stderr, dim=True), file=sys.stderr, flush=True)


def _styled(text: str, stream: TextIO, **style: bool) -> str:
    """A text in a style, where the stream is a terminal and the user has not set NO_COLOR."""
    is_plain = not stream.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if is_plain else typer.style(text, **style)


def _write(text: str) -> None:
    """Print a part of the text at once."""
    sys.stdout.write(_harmless(text))
    sys.stdout.flush()


def _harmless(text: str) -> str:
    """A text that cannot command the terminal, whatever the model wrote."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" else printable(c) for c in text)


# ---- reading lines


def _read_message(draft: str | None) -> str:
    r"""Read one message or command; a line that ends in ``\`` goes on in the next one.

    Args:
        draft: What the line begins with, for the user to edit.

    Raises:
        EOFError: There is no more.
        KeyboardInterrupt: Ctrl-C was pressed. Its argument is what had been typed.
        InputError: The line is not UTF-8.
    """
    message = _read_line("> ", draft or "")
    while message.endswith("\\"):
        message = message[:-1] + "\n"
        try:
            message += _read_line(". ")
        except EOFError:
            break
    return message


def _read_line(prompt: str, draft: str = "") -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_utf8(line, "the message").removesuffix("\n").removesuffix("\r")
    if readline is None:
        return argument_text(input(prompt), "the message")
    previous = signal.signal(signal.SIGINT, _interrupt_line)
    readline.set_startup_hook(lambda: readline.insert_text(draft))
    try:
        return argument_text(input(prompt), "the message")
    finally:
        readline.set_startup_hook()
        signal.signal(signal.SIGINT, previous)


def _interrupt_line(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt with what stood on the line, which readline then forgets."""
    raise KeyboardInterrupt(readline.get_line_buffer())


@contextlib.contextmanager
def _prompt_history() -> Iterator[None]:
    """Keep what is typed in a file from one chat to the next, where that is possible."""
    from mmrec.data.corpus import cache_folder

    if readline is None or not sys.stdin.isatty():
        yield
        return
    path: Path | None = None
    with contextlib.suppress(InputError, OSError):
        path = cache_folder().with_name("chat_history")
        readline.set_history_length(HISTORY_LINES)
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)


# ---- the conversation


@dataclass
class Turn:
    """What one message, or one command that replaced the text, did."""

    before: "Session"
    """The session before it, to which /undo returns."""
    message: str | None
    """What the user wrote; None of /load and /new."""
    answer: str
    """What the model wrote; of /load and /new what they did."""
    seed: int = 0


class Chat:
    """What is written in turns: its session, the settings of answers, and the turns.

    Attributes:
        session: The text so far and its state.
        turns: What led to it, the newest last.
        draft: What the next line begins with, for the user to edit; None if none is edited.
        is_ended: Whether the user has ended the chat.
        is_chat: Whether the model answers messages by a chat template, instead of continuing.
    """

    def __init__(
        self,
        session: "Session",
        sampling: dict[str, Any] | None = None,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> None:
        """Begin.

        Args:
            session: The text so far.
            sampling: Settings of ``SamplingConfig`` that are not the defaults.
            max_tokens: Most tokens per answer.
            stop: Texts that end an answer.
            seed: That of every answer; None draws one for each.
        """
        self.session, self.turns = session, list[Turn]()
        self.is_chat = bool(session.decoder.tokenizer.chat_template)
        self.draft: str | None = None
        self.is_ended = False
        self._sampling = dict(sampling or {})
        self._max_tokens, self._stop, self._seed = max_tokens, stop, seed

    def take(self, line: str) -> None:
        """Do what a line says: a command after ``/``, else a message or text to continue.

        Raises:
            InputError: It holds a mistake. Nothing has changed.
        """
        is_edited, self.draft = self.draft is not None, None
        if not line.startswith("/") or line.startswith("//"):
            message = line.removeprefix("/") if line.startswith("//") else line
            if is_edited:
                self._send_again(message, None)
            else:
                self.send(message)
            return
        name, _, argument = line[1:].partition(" ")
        if name != "edit":
            argument = argument.strip()
        if (setting := SAMPLING.get(name.replace("-", "_"))) is not None:
            self._set(setting, argument)
        elif name not in COMMANDS:
            hint = did_you_mean(f"/{name}", [f"/{known}" for known in (*COMMANDS, *SAMPLING_NAMES)])
            raise InputError(
                f"unknown command {line.split()[0]!r}{hint} (/help lists them; a text may begin "
                "with //)"
            )
        elif argument and not COMMANDS[name].argument:
            raise InputError(f"/{name} takes nothing after it; got {argument!r}")
        else:
            COMMANDS[name].run(self, argument)

    def send(self, message: str, seed: int | None = None) -> None:
        """Say something and let the model answer, or append a text and let the model continue it.

        Args:
            message: May be empty: the model goes on.
            seed: That of the answer; None is that of the chat, or a new one.
        """
        from mmrec.runtime.progress import progress_bar

        before, self.session = self.session, self.session.fork()
        seed = self._seed if seed is None else seed
        seed = secrets.randbits(SEED_BITS) if seed is None else seed
        try:
            with progress_bar(None, "reading", "tok") as bar:
                self.session.read(message, progress=bar.update)
            answer = self._write_answer(seed)
        except BaseException:
            self.session = before
            raise
        self.turns.append(Turn(before, message, answer, seed))

    def _write_answer(self, seed: int) -> str:
        """Print what the model writes while it is written, until the user presses Ctrl-C."""
        pieces = self.session.generate(
            max_tokens=self._max_tokens, stop=self._stop, seed=seed, **self._sampling
        )
        shown = ""
        with note_interrupts() as is_interrupted, contextlib.closing(pieces):
            for piece in pieces:
                _write(piece)
                shown += piece
                if is_interrupted():
                    break
        completion = self.session.completion
        assert completion is not None
        _write(completion.text[len(shown) :])  # an end that was held back
        if not completion.text.endswith("\n"):
            _write("\n")
        if completion.finish_reason == "cancelled":
            _note("(stopped)")
        elif self.is_chat and completion.finish_reason == "length":
            _note("(the answer has more tokens; an empty line goes on with it)")
        elif completion.finish_reason == "stop" and not (self._stop or self.is_chat):
            _note("(here the model ends its text)")
        return completion.text

    def _send_again(self, message: str | None, seed: int | None) -> None:
        """Replace the newest turn by one with another message, or with another seed."""
        turn, session = self._newest_message(), self.session
        self.turns.pop()
        self.session = turn.before
        try:
            self.send(str(turn.message) if message is None else message, seed)
        except BaseException:
            self.session = session
            self.turns.append(turn)
            raise

    def _newest_message(self) -> Turn:
        if not self.turns or self.turns[-1].message is None:
            raise InputError("there is no message to send again")
        return self.turns[-1]

    def _set(self, setting: Setting, argument: str) -> None:
        """Show or change a setting of ``SamplingConfig``."""
        if argument:
            try:
                value = setting.type(argument)
            except ValueError:
                kind = "a whole number" if setting.type is int else "a number"
                raise InputError(f"{setting.name} must be {kind}; got {argument!r}") from None
            self._sampling |= {setting.name: setting.check(value)}
        value = self._sampling.get(setting.name, setting.default)
        _note(f"{setting.flag.removeprefix('--')} {value:g}")

    # ---- commands

    def edit(self, argument: str) -> None:
        """Send the newest message again, changed."""
        turn = self._newest_message()
        if argument:
            self._send_again(argument, None)
        elif readline is None or not sys.stdin.isatty():
            raise InputError("/edit needs the new text after it, as this is no terminal")
        else:
            self.draft = "/" * str(turn.message).startswith("/") + str(turn.message)

    def retry(self, argument: str) -> None:
        """Draw another answer to the newest message."""
        seed = None if self._seed is None else (self._newest_message().seed + 1) % (MAX_SEED + 1)
        self._send_again(None, seed)

    def undo(self, argument: str) -> None:
        """Return to where the text stood before the newest turn."""
        if not self.turns:
            raise InputError("there is nothing to undo")
        turn = self.turns.pop()
        self.session = turn.before
        what = turn.answer if turn.message is None else f"'{shorten(turn.message, 60)}'"
        _note(f"undone: {what}")

    def _replace(self, session: "Session", what: str) -> None:
        self.turns.append(Turn(self.session, None, what))
        self.session = session
        _note(what)

    def new(self, argument: str) -> None:
        """Begin an empty text or chat."""
        self._replace(self.session.fresh(), "new chat" if self.is_chat else "new text")

    def save(self, argument: str) -> None:
        """Write the session to a file."""
        path = _session_file(argument, "save")
        self.session.save(path, option="NAME", force=None)
        _note(f"saved {self.session.length:,} tokens: {path}")

    def load(self, argument: str) -> None:
        """Continue a session that was saved."""
        path = _session_file(argument, "load")
        session = type(self.session).load(path, self.session.decoder)
        self._replace(session, f"loaded {path}")
        self._show_text(session)

    def change_seed(self, argument: str) -> None:
        """Show or change the seed of answers."""
        if argument == "random":
            self._seed = None
        elif argument:
            try:
                self._seed = SEED.check(int(argument))
            except ValueError as error:
                rule = str(error) if isinstance(error, InputError) else ""
                raise InputError(
                    rule or f"seed must be a whole number, or random; got {argument!r}"
                ) from None
        _note("seed random" if self._seed is None else f"seed {self._seed}")

    def change_max_tokens(self, argument: str) -> None:
        """Show or change the most tokens of an answer."""
        if argument:
            if not argument.isdecimal() or int(argument) > MAX_COUNT:
                raise InputError(f"max-tokens must be a whole number >= 0; got {argument!r}")
            self._max_tokens = int(argument)
        _note(f"max-tokens {self._max_tokens}")

    def settings(self, argument: str) -> None:
        """Show all settings."""
        for setting in SAMPLING.values():
            self._set(setting, "")
        self.change_seed("")
        self.change_max_tokens("")

    def history(self, argument: str = "") -> None:
        """Show the turns."""
        self._show_text(self.turns[0].before if self.turns else self.session)
        for number, turn in enumerate(self.turns, 1):
            if turn.message is None:
                _note(f"[{number}] {turn.answer}")
                continue
            _note(f"[{number}] seed {turn.seed}")
            print(f"> {_styled(_harmless(turn.message), sys.stdout, bold=True)}")
            _write(turn.answer if turn.answer.endswith("\n") else f"{turn.answer}\n")

    def _show_text(self, session: "Session") -> None:
        """Print the end of a text, or the messages of a chat."""
        messages = getattr(session, "messages", None)
        for message in messages or ():
            _write(f"{message['role']}: {message['content']}\n")
        if session.length and messages is None:
            _note(f"(a text of {session.length:,} tokens, which ends:)")
            _write(f"{session.text[-SHOWN_CHARS:]}\n")

    def help(self, argument: str) -> None:
        """Tell the commands."""
        print(CHAT_HELP if self.is_chat else HELP, flush=True)

    def quit(self, argument: str) -> None:
        """End the chat."""
        self.is_ended = True


def _session_file(name: str, command: str) -> Path:
    """The file that a name of /save and /load means: with ``.h5``, unless it has a suffix."""
    if not name:
        raise InputError(f"/{command} needs a name, such as /{command} story")
    path = user_path(name)
    return path if path.suffix else path.with_name(f"{path.name}.h5")


class Command(NamedTuple):
    """One command of the chat."""

    argument: str
    help: str
    run: Callable[[Chat, str], None]


COMMANDS = {
    "edit": Command("[TEXT]", "change your newest message and send it again", Chat.edit),
    "retry": Command("", "another answer to it, with another seed", Chat.retry),
    "undo": Command("", "return to where the text stood before it", Chat.undo),
    "new": Command("", "begin anew, with nothing written", Chat.new),
    "save": Command("NAME", "write the text and its state to NAME.h5", Chat.save),
    "load": Command("NAME", "continue what /save wrote", Chat.load),
    "history": Command("", "show the turns", Chat.history),
    "settings": Command("", "show the settings of answers", Chat.settings),
    "seed": Command("[N]", "equal seeds give equal answers; random", Chat.change_seed),
    "max-tokens": Command("[N]", "most tokens of an answer", Chat.change_max_tokens),
    "help": Command("", "show this", Chat.help),
    "quit": Command("", "end; so does Ctrl-D", Chat.quit),
}
SAMPLING_NAMES = [name.replace("_", "-") for name in SAMPLING]


def _help(introduction: list[str]) -> str:
    rows = [(f"/{name} {c.argument}", c.help) for name, c in COMMANDS.items()]
    rows += [(f"/{s.flag.removeprefix('--')} [X]", s.help) for s in SAMPLING.values()]
    lines = [f"  {usage:<26} {text}" for usage, text in rows]
    return "\n".join([*introduction, *lines])


HELP = _help(
    [
        "The model continues what you write, directly after its last character. An empty",
        "line lets it go on. A line that ends in \\ goes on in the next one. A text that",
        "begins with / is written with //. Ctrl-C stops an answer; the text so far stays.",
    ]
)
CHAT_HELP = _help(
    [
        "The model answers your messages. After an answer that was cut short an empty line",
        "lets it go on. A line that ends in \\ goes on in the next one. A message that begins",
        "with / is written with //. Ctrl-C stops an answer; what is written of it stays.",
    ]
)
