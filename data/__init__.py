"""Corpora by name and by file, tokenizers, the HDF5 corpus, batches."""

from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.data.tokenizer import Tokenizer, train_tokenizer

__all__ = ["Corpus", "Tokenizer", "prepare", "train_tokenizer"]
