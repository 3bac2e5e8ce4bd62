"""The text that a checkpoint was trained on, and whether it may be read.

A checkpoint is data from anywhere. What it names is read only if it is a built-in corpus. Otherwise
the config.toml of the run folder around the checkpoint, which a user can look at, names the text;
and the fingerprint says whether that is the text that the checkpoint was trained on.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import SOURCES, DataConfig, TrainConfig, read_config_file
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import open_corpus, prepare, read_options
from mmrec.data.sources import CORPUS_NAMES, source_files
from mmrec.errors import InputError
from mmrec.pretrained import pretrained_of


def training_config(loaded: LoadedModel) -> TrainConfig:
    """Return the settings that a checkpoint was trained with."""
    return TrainConfig.from_dict(loaded.metadata.get("train", {}))


def files_of_run(checkpoint: Path) -> Iterator[Path]:
    """List a checkpoint and the files of the text that the config.toml beside it names.

    Args:
        checkpoint: its path.
    """
    yield checkpoint
    beside = checkpoint.with_name("config.toml")
    with contextlib.suppress(InputError):
        train = read_config_file(beside).train if beside.is_file() else {}
        for name in SOURCES:
            yield from source_files(train.get(name, ""))


def check_provenance(loaded: LoadedModel, *, option: str = "--data") -> DataConfig:
    """Return the settings of the text that a checkpoint was trained on, if it may be read.

    The text's place is that of the config.toml beside the checkpoint, if there is one: a resume may
    have found the text elsewhere since the checkpoint was written.

    Args:
        loaded: the checkpoint.
        option: what the error message names as the way to give another text.

    Raises:
        InputError: the text may not be read, or the config.toml cannot be read.
    """
    data = training_config(loaded).data
    if data.source in CORPUS_NAMES and not data.val_file:
        return data
    beside = loaded.path.with_name("config.toml")
    train = read_config_file(beside).train if beside.is_file() else {}
    if "data" not in train and (pretrained := pretrained_of(loaded.path)):
        raise InputError(
            f"the pretrained model {pretrained.name} comes without its text: give {option}, a text"
        )
    if "data" not in train:
        raise InputError(
            f"{loaded.path} says it was trained on {data.source!r}; what a file names is not read "
            f"unless the config.toml beside it names it too: give {option}"
        )
    return dataclasses.replace(data, source=train["data"], val_file=train.get("val_file", ""))


def training_corpus(
    loaded: LoadedModel,
    *,
    option: str = "--data",
    echo: Callable[[str], None] | None = None,
) -> Corpus:
    """Open the corpus that a checkpoint was trained on, under the tokenizer of the checkpoint.

    Args:
        loaded: the checkpoint.
        option: what error messages name as the way to give another text.
        echo: called with a line of text at each stage of preparing the corpus.

    Raises:
        InputError: the text may not be read, cannot be read, or is not what it was in training.
    """
    data = check_provenance(loaded, option=option)
    source, options = data.source, read_options(data)
    # where training made the tokenizer from the text, its prepared corpus is found again
    is_own = not training_config(loaded).finetune.initialize_from
    tokenizer = data.tokenizer if is_own else loaded.tokenizer
    try:
        corpus = Corpus.open(prepare(source, tokenizer, data.vocab, None, echo, options))
    except InputError as error:
        if next(source_files(source), None) is not None or source in CORPUS_NAMES:
            raise
        run = shlex.quote(str(loaded.path.parent))
        raise InputError(
            f"{error}; if the text was moved, tell its run where it is: mmrec train --resume "
            f"{run} --data NEW"
        ) from None
    if not corpus.continues(loaded.metadata.get("fingerprint")):
        raise InputError(
            f"the text of {source}, or how mmrec reads it, changed since training: give {option}"
        )
    if corpus.tokenizer.to_json() != loaded.tokenizer.to_json():
        corpus = open_corpus(source, loaded.tokenizer, echo, options)
    return corpus
