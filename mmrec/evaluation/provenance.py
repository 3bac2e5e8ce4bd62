"""The text that a checkpoint was trained on, and whether it may be read.

A checkpoint is data from anywhere. The path that it names is read only if it is a built-in corpus,
or if the config.toml of the run folder around the checkpoint names it too.
"""

from collections.abc import Callable
from pathlib import Path

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import DataConfig, TrainConfig, read_config_file
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import open_corpus, prepare, read_options
from mmrec.data.sources import CORPUS_NAMES
from mmrec.errors import InputError


def training_config(loaded: LoadedModel) -> TrainConfig:
    """Return the settings that a checkpoint was trained with."""
    return TrainConfig.from_dict(loaded.metadata.get("train", {}))


def may_read(data: DataConfig, checkpoint: Path) -> bool:
    """Whether the text that a checkpoint names may be read.

    Args:
        data: the settings of the text that are stored in the checkpoint.
        checkpoint: its path.

    Raises:
        InputError: the config.toml beside the checkpoint cannot be read.
    """
    if data.source in CORPUS_NAMES and not data.val_file:
        return True
    beside = checkpoint.with_name("config.toml")
    train = read_config_file(beside).train if beside.is_file() else {}
    return (train.get("data"), train.get("val_file", "")) == (data.source, data.val_file)


def check_provenance(loaded: LoadedModel, *, option: str = "--data") -> DataConfig:
    """Return the settings of the text that a checkpoint was trained on, if it may be read.

    Args:
        loaded: the checkpoint.
        option: what the error message names as the way to give another text.

    Raises:
        InputError: the text may not be read.
    """
    data = training_config(loaded).data
    if not may_read(data, loaded.path):
        raise InputError(
            f"{loaded.path} says it was trained on {data.source!r}; what a file names is not read "
            f"unless the config.toml beside it names it too: give {option}"
        )
    return data


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
    corpus = Corpus.open(prepare(source, tokenizer, data.vocab, None, echo, options))
    if corpus.info["fingerprint"] != loaded.metadata.get("fingerprint"):
        raise InputError(
            f"the text of {source}, or how mmrec reads it, changed since training: give {option}"
        )
    if corpus.tokenizer.to_json() != loaded.tokenizer.to_json():
        corpus = open_corpus(source, loaded.tokenizer, echo, options)
    return corpus
