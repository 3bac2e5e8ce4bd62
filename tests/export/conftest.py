"""Models of every kind with random weights, and the checkpoints that are exported."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec.checkpoint.checkpoint import LoadedModel, load_model, save_checkpoint
from mmrec.cli import main
from mmrec.config import ModelConfig
from mmrec.data.tokenizer import Tokenizer, train_tokenizer
from mmrec.lora import apply_lora
from mmrec.model import Model

KINDS = ("bpe", "char", "byte")
METADATA = {
    "preset": "tiny",
    "train": {"data": {"source": "bücher/book.txt", "tokenizer": "char"}},
    "val": {"loss": 1.25, "bits_per_byte": 0.1 + 0.2},
    "fingerprint": "0123",
}
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process; return its exit code."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mmrec", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main.run()
        return int(caught.value.code or 0)

    return call


@pytest.fixture(scope="session")
def tokenizers(text_file: Path) -> dict[str, Tokenizer]:
    """A tokenizer of each kind, of a real text."""
    text = text_file.read_text(encoding="utf-8")
    return {kind: train_tokenizer(kind, [text], 300) for kind in KINDS}


def make_model(vocab_size: int, **settings: Any) -> Model:
    """A model with every type of layer and with weights that all count."""
    shape = {"width": 24, "depth": 4, "heads": 2, "layer_types": "nslb", "recurrent_blocks": 2}
    shape |= {"ffn_multiplier": 1.7, "dropout": 0.1, "ngram_buckets": 50, "max_ngram": 5}
    torch.manual_seed(1)
    model = Model(ModelConfig(**(shape | {"vocab_size": vocab_size} | settings)))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(
    tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, LoadedModel]:
    """A checkpoint by kind of tokenizer; one with LoRA factors; one without n-grams and taps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings: dict[str, Any] = {"optimizer": None, "progress": None}
    for kind, tokenizer in tokenizers.items():
        model = make_model(tokenizer.vocab_size)
        save_checkpoint(folder / f"{kind}.h5", model, tokenizer, 7, METADATA)
    tokenizer = tokenizers["byte"]
    model = make_model(tokenizer.vocab_size, ngram_buckets=0, conv_width=1, recurrent_blocks=1)
    save_checkpoint(folder / "plain.h5", model, tokenizer, 7, METADATA)
    model = make_model(tokenizer.vocab_size)
    apply_lora(model, 3, 8.0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    settings = {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0), "progress": {}}
    save_checkpoint(folder / "lora.h5", model, tokenizer, 7, METADATA, **settings)
    return {path.stem: load_model(path) for path in sorted(folder.iterdir())}
