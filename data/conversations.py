"""Conversations in JSON lines, and the corpus that fine-tuning on them takes.

A line is an object with ``messages``, a list of objects with ``role`` and ``content``, as OpenAI's
API has them; or with ``prompt`` and ``completion``. Only what an assistant writes is learnt.
"""

import hashlib
import itertools
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmrec.checkpoint.hdf5 import atomic_h5_file, open_h5_file, read_json, write_array, write_json
from mmrec.data.chat_template import (
    DEFAULT_TEMPLATE,
    ROLES,
    ChatTemplate,
    Message,
    Part,
    special_token_names,
)
from mmrec.data.corpus import KIND, SCHEMA, SPLITS, Split, cache_folder, is_prepared, token_dtype
from mmrec.data.formats import decompressed, first_records
from mmrec.data.readers import CHUNK_BYTES, ReadOptions, open_file, text_problem
from mmrec.data.tokenizer import Tokenizer, extend_characters
from mmrec.errors import InputError
from mmrec.runtime.names import MAX_STEM_CHARS, shorten, user_path
from mmrec.runtime.progress import progress_bar

VERSION = 1
"""Counts changes of how conversations become tokens."""
LONGEST_SHOWN = 3
"""Conversations of which a corpus keeps where they come from."""

Echo = Callable[[str], None]
"""Called with each line of text for the user."""


class Conversation(NamedTuple):
    """One conversation."""

    place: str
    """Where it comes from: file and line."""
    messages: list[Message]
    untrained: frozenset[int]
    """Indices of messages of the assistant that are not learnt: those of ``weight`` 0."""


class Tokens(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    answers: list[bool]
    """For each token whether it belongs to an answer."""
    answer_bytes: int
    """UTF-8 bytes of the answers."""


def holds_conversations(source: object) -> bool:
    """Whether a source is a file whose first record is a conversation.

    Args:
        source: see ``mmrec.data.sources.iter_documents``.
    """
    if not isinstance(source, str | Path) or is_prepared(source):
        return False
    path = user_path(source)
    try:
        if not path.is_file():
            return False
        with open_file(path, str(path)) as stream, decompressed(stream, str(path)) as opened:
            records = first_records(opened.head)
    except (InputError, OSError, ValueError):  # reading it as text says what is wrong
        return False
    return bool(records) and ("messages" in records[0] or {"prompt", "completion"} <= {*records[0]})


def chat_tokenizer(tokenizer: Tokenizer, template: str | None, name: str) -> Tokenizer:
    """Return a model's tokenizer with a chat template and its special tokens.

    Args:
        tokenizer: that of the model.
        template: the template's source; None takes the model's own, else the default.
        name: what an error calls the template.

    Raises:
        InputError: the template cannot be used for training; see ``check_for_training``.
    """
    source = template or tokenizer.chat_template or DEFAULT_TEMPLATE
    names = special_token_names(source, tokenizer, name)
    made = tokenizer.with_chat_template(source, names)
    ChatTemplate(source, made, name).check_for_training()
    return made


# ---- reading


def read_conversations(path: Path, options: ReadOptions) -> Iterator[Conversation]:
    """Read the conversations of a file of JSON lines, which may be compressed.

    Args:
        path: the file.
        options: ``skip_bad`` and ``max_bytes`` count.

    Raises:
        InputError: the file cannot be read, or a line is no conversation and is not skipped. The
            message names file and line.
    """
    name, size = str(path), 0
    with open_file(path, name) as stream, decompressed(stream, name) as opened:
        for number, line in enumerate(opened.stream, 1):
            if not line.strip():
                continue
            place = f"{name} line {number}"
            try:
                messages, untrained = _read_line(line)
            except InputError as error:
                options.reject(f"{place} {error}")
                continue
            yield Conversation(place, messages, untrained)
            size += sum(len(message["content"].encode()) for message in messages)
            if 0 < options.max_bytes <= size:
                return


def _read_line(line: bytes) -> tuple[list[Message], frozenset[int]]:
    """Messages of a line up to the last answer, and those that are not learnt.

    Raises:
        InputError: it is no conversation; the text goes on after its place.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError("must be UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"must be JSON, one conversation per line: {error}") from None
    given = _given_messages(record)
    if not given:
        raise InputError("must hold messages; the list is empty")
    messages = [_message(i, message) for i, message in enumerate(given, 1)]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise InputError("must have a message of the assistant, which is what is learnt")
    untrained = frozenset(i for i in answers if given[i].get("weight", 1) == 0)
    trained = [i for i in answers if i not in untrained]
    if not trained:
        raise InputError("must have an answer of weight 1; all are of weight 0")
    return messages[: trained[-1] + 1], untrained


def _given_messages(record: Any) -> list[Any]:
    if not isinstance(record, dict):
        raise InputError("must be a JSON object")
    if "messages" in record:
        if not isinstance(record["messages"], list):
            raise InputError("must hold a list of messages; messages is none")
        return record["messages"]
    if {"prompt", "completion"} <= record.keys():
        return [
            {"role": role, "content": record[field]}
            for role, field in (("user", "prompt"), ("assistant", "completion"))
        ]
    fields = ", ".join(map(repr, list(record)[:8])) or "none"
    raise InputError(
        f"must have the field 'messages', or 'prompt' and 'completion'; its fields are: {fields}"
    )


def _message(number: int, message: Any) -> Message:
    place = f"message {number}"
    if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
        raise InputError(f"{place} must hold role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(
            f"{place} must be of one of the roles {', '.join(ROLES)}; got {shorten(repr(role), 40)}"
        )
    if not isinstance(content, str):
        raise InputError(f"{place} must have text as content; got {shorten(repr(content), 40)}")
    if not content.strip():
        raise InputError(f"{place} must have text as content; it is empty")
    if problem := text_problem(content):
        raise InputError(f"{place} {problem}")
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"{place} must have the weight 0 or 1; got {message['weight']!r}")
    return {"role": role, "content": content}


# ---- tokens


def tokenize_conversations(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, *, add_characters: bool = False
) -> tuple[Tokenizer, list[Tokens]]:
    """Tokenise conversations by the chat template of a tokenizer.

    Args:
        conversations: the conversations.
        tokenizer: it has a chat template.
        add_characters: add characters that a ``char`` tokenizer does not know.

    Returns:
        The tokenizer, and the tokens of each conversation.

    Raises:
        InputError: the template refuses a conversation, or a character is unknown.
    """
    template, parts = ChatTemplate(tokenizer.chat_template, tokenizer), list[list[Part]]()
    places = []
    with progress_bar(None, "reading conversations", "conv") as bar:
        for conversation in conversations:
            try:
                parts.append(template.parts(conversation.messages, conversation.untrained))
            except InputError as error:
                raise InputError(f"{conversation.place}: {error}") from None
            places.append(conversation.place)
            bar.update()
    if add_characters and tokenizer.kind == "char":
        texts = (part.text for part in itertools.chain(*parts) if not part.is_special)
        tokenizer = extend_characters(tokenizer, texts)
        template = ChatTemplate(tokenizer.chat_template, tokenizer)
    tokens = []
    for place, pieces in zip(places, parts, strict=True):
        texts_of_answers = (p.text for p in pieces if p.is_answer and not p.is_special)
        size = sum(len(text.encode()) for text in texts_of_answers)
        tokens.append(Tokens(*template.encode(pieces, place), size))
    return tokenizer, tokens


def make_split(conversations: Sequence[Tokens], tokenizer: Tokenizer) -> Split:
    """Join conversations, each of which is a document. Its bytes are those of its answers."""
    dtype, eot = token_dtype(tokenizer), tokenizer.eot
    ids = [np.array([*tokens.ids, eot], dtype) for tokens in conversations]
    answers = [np.array([*tokens.answers, False]) for tokens in conversations]
    return Split(
        np.concatenate([np.empty(0, dtype), *ids]),
        np.cumsum([0, *map(len, ids)], dtype=np.int64),
        np.array([tokens.answer_bytes for tokens in conversations], np.int64),
        np.concatenate([np.empty(0, bool), *answers]),
    )


def conversations_to_score(source: str | Path, tokenizer: Tokenizer, options: ReadOptions) -> Split:
    """Tokenise all conversations of a file, to score the answers.

    Raises:
        InputError: see ``read_conversations``; or there is none.
    """
    path = user_path(source)
    _, tokens = tokenize_conversations(read_conversations(path, options), tokenizer)
    if not tokens:
        raise options.no_text(str(path))
    return make_split(tokens, tokenizer)


# ---- the corpus


def prepare_conversations(
    source: str | Path,
    tokenizer: Tokenizer,
    options: ReadOptions,
    echo: Echo,
    *,
    add_characters: bool = False,
) -> Path:
    """Prepare the corpus file of conversations, or find the one that exists, and return its path.

    Conversations are divided as wholes: those whose messages up to the first answer are equal lie
    in the same split. The division depends on their contents only. Exact copies are left out, and
    with ``val_file`` training conversations that begin like one of that file.

    Args:
        source: a file of JSON lines.
        tokenizer: it has a chat template.
        options: how the file is read and split.
        echo: called with each line of text for the user.
        add_characters: add characters that a ``char`` tokenizer does not know.

    Raises:
        InputError: a file cannot be read, or there are too few conversations to split.
        StorageError: the corpus file cannot be written.
    """
    path, val_path = user_path(source), user_path(options.val_file) if options.val_file else None
    digests = [_file_digest(p) for p in (path, val_path) if p is not None]
    cache_key: list[Any] = [
        *digests,
        hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        options.val_fraction,
        options.max_bytes,
        options.skip_bad,
        add_characters,
        VERSION,
        SCHEMA,
    ]
    key = hashlib.sha256(json.dumps(cache_key).encode()).hexdigest()[:16]
    stem = "".join(c if c.isalnum() and c.isascii() else "-" for c in path.stem[:MAX_STEM_CHARS])
    target = cache_folder() / f"{stem.strip('-') or 'chat'}-chat-{key}.h5"
    if _has_cache_key(target, cache_key):
        echo(f"corpus {source}: unchanged, using {target}")
        return target
    given = list(read_conversations(path, options))
    if not given:
        raise options.no_text(str(path))
    unique = _without_copies(given)
    count, copies = len(unique), len(given) - len(unique)
    if val_path is None:
        val = _choose_validation(unique, options.val_fraction)
    else:
        scored = _without_copies(read_conversations(val_path, options))
        beginnings = set(map(_beginning, scored))
        unique = [c for c in unique if _beginning(c) not in beginnings]
        copies += count - len(unique)
        val = np.arange(len(unique) + len(scored)) >= len(unique)
        unique += scored
    if val.all() or not val.any():
        raise InputError(
            f"{source} must have conversations for training and for validation, which begin in "
            f"different ways; it has {count}: use more, or name others with --val-file"
        )
    tokenizer, tokens = tokenize_conversations(unique, tokenizer, add_characters=add_characters)
    parts = [[t for t, is_val in zip(tokens, val, strict=True) if is_val == s] for s in (0, 1)]
    splits = [make_split(part, tokenizer) for part in parts]
    answers = sum(int(split.answers.sum()) for split in splits if split.answers is not None)
    total = sum(split.n_tokens for split in splits)
    info = {
        "source": str(source),
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "cache_key": cache_key,
        "duplicates": copies,
        "near_duplicates": 0,
        "skipped": options.skipped_records,
        "longest": _longest(unique, tokens, val),
        "random": [],
        "mixture": [{"source": str(source), "weight": 1.0, "end": splits[0].n_tokens}],
        "python": platform.python_version(),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_h5_file(target, KIND, SCHEMA) as file:
        for name, split in zip(SPLITS, splits, strict=True):
            write_array(file, f"{name}/tokens", split.tokens)
            write_array(file, f"{name}/doc_offsets", split.doc_offsets)
            write_array(file, f"{name}/doc_bytes", split.doc_bytes)
            assert split.answers is not None
            write_array(file, f"{name}/answers", split.answers.astype(np.uint8))
        write_json(file, "tokenizer", json.loads(tokenizer.to_json()))
        write_json(file, "info", info)
    echo(
        f"corpus {source}: {len(parts[0]):,} conversations for training, {len(parts[1]):,} for "
        f"validation; answers are {answers / total:.0%} of {total:,} tokens; {target}"
    )
    if copies:
        echo(f"note    copies of other conversations, which are left out: {copies:,}")
    if options.skipped_records:
        echo(
            f"note    {options.skipped_records:,} broken lines were skipped; the first: "
            f"{options.skip_reason}"
        )
    return target


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path, str(path)) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _has_cache_key(path: Path, cache_key: list[Any]) -> bool:
    try:
        with open_h5_file(path, KIND, SCHEMA, SCHEMA) as file:
            return bool(read_json(file, "info")["cache_key"] == cache_key)
    except InputError:
        return False


def _without_copies(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The conversations whose messages did not come before."""
    first = dict[str, Conversation]()
    for conversation in conversations:
        first.setdefault(json.dumps(conversation.messages), conversation)
    return list(first.values())


def _choose_validation(conversations: Sequence[Conversation], fraction: float) -> np.ndarray:
    """Choose about a fraction of conversations, (n,) bool, by hashes of how they begin."""
    beginnings = [_beginning(conversation) for conversation in conversations]
    wanted, chosen = max(1, round(fraction * len(beginnings))), set[str]()
    for count, beginning in enumerate(sorted(beginnings)):
        if count >= wanted and beginning not in chosen:
            break
        chosen.add(beginning)
    return np.array([beginning in chosen for beginning in beginnings])


def _beginning(conversation: Conversation) -> str:
    """SHA-256 of the messages before the first answer."""
    messages = itertools.takewhile(lambda m: m["role"] != "assistant", conversation.messages)
    return hashlib.sha256(json.dumps(list(messages)).encode()).hexdigest()


def _longest(
    conversations: Sequence[Conversation], tokens: Sequence[Tokens], val: np.ndarray
) -> list[dict[str, Any]]:
    """Where the longest conversations of the training split come from."""
    lengths = np.array([len(t.ids) for t in tokens]) * ~val
    return [
        {
            "name": conversations[i].place,
            "bytes": tokens[i].answer_bytes,
            "text": shorten(conversations[i].messages[0]["content"], 72),
        }
        for i in np.argsort(-lengths, kind="stable")[:LONGEST_SHOWN]
        if lengths[i]
    ]
