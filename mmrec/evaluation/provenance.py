"""The text that a checkpoint was trained on, and whether it may be read.

A checkpoint is data from anywhere. The path that it names is read only if it is a built-in corpus,
or if the config.toml of the run folder around the checkpoint names it too.
"""

from collections.abc import Callable
from pathlib import Path

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import TrainConfig, read_config_file
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import open_corpus, prepare, read_options
from mmrec.data.sources import NAMES
from mmrec.errors import InputError


def training_config(loaded: LoadedModel) -> TrainConfig:
    """Return the settings that a checkpoint was trained with."""
    return TrainConfig.from_dict(loaded.metadata.get("train", {}))


def may_read(config: TrainConfig, checkpoint: Path) -> bool:
    """Whether the text that a checkpoint names may be read.

    Args:
        config: the settings stored in the checkpoint.
        checkpoint: its path.

    Raises:
        InputError: the config.toml beside the checkpoint cannot be read.
    """
    if config.data.source in NAMES and not config.data.val_file:
        return True
    beside = checkpoint.with_name("config.toml")
    train = read_config_file(beside).train if beside.is_file() else {}
    named = train.get("data"), train.get("val_file", "")
    return named == (config.data.source, config.data.val_file)


def check_provenance(loaded: LoadedModel, option: str = "--data") -> TrainConfig:
    """Return the training settings of a checkpoint whose text may be read.

    Args:
        loaded: the checkpoint.
        option: what the error message names as the way to give another text.

    Raises:
        InputError: the text may not be read.
    """
    config = training_config(loaded)
    if not may_read(config, loaded.path):
        raise InputError(
            f"{loaded.path} says it was trained on {config.data.source!r}; what a file names is not read "
            f"unless the config.toml beside it names it too: give {option}"
        )
    return config


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
    config = check_provenance(loaded, option)
    # where training made the tokenizer from the text, its prepared corpus is found again
    tokenizer = loaded.tokenizer if config.finetune.initialize_from else config.data.tokenizer
    source, options = config.data.source, read_options(config.data)
    corpus = Corpus.open(prepare(source, tokenizer, config.data.vocab, None, echo, options))
    if corpus.info["fingerprint"] != loaded.metadata.get("fingerprint"):
        raise InputError(
            f"the text of {source}, or how mmrec reads it, changed since training: "
            f"give {option}"
        )
    if corpus.tokenizer.to_json() != loaded.tokenizer.to_json():
        corpus = open_corpus(source, loaded.tokenizer, echo, options)
    return corpus
