"""A model with a chat template leaves and comes back, and transformers applies the template."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.data.chat_template import ChatTemplate
from mmrec.data.conversations import chat_tokenizer
from mmrec.export.safetensors import import_folder
from mmrec.export.transformers import export_transformers
from mmrec.model import Model

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3? <|end|>"},
]


@pytest.mark.parametrize("name", ["bpe", "byte"])
def test_a_chat_model_in_transformers(
    name: str, checkpoints: dict[str, LoadedModel], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = checkpoints[name]
    tokenizer = chat_tokenizer(loaded.tokenizer, None, "the default template")
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    config = dataclasses.replace(loaded.model.config, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = dataclasses.replace(loaded, model=Model(config).eval(), tokenizer=tokenizer)
    export_transformers(model, tmp_path / "chat")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat", trust_remote_code=True)
    simple = [m | {"content": m["content"].replace(" <|end|>", "")} for m in MESSAGES]
    ids = opened.apply_chat_template(simple, add_generation_prompt=True, return_dict=False)
    assert ids == template.prompt(simple)  # type: ignore[arg-type]
    generation = json.loads((tmp_path / "chat" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eot, template.end_of_turn]
    back = import_folder(tmp_path / "chat")
    assert back.tokenizer.to_json() == tokenizer.to_json()
    again = ChatTemplate(str(back.tokenizer.chat_template), back.tokenizer)
    assert again.prompt(MESSAGES) == template.prompt(MESSAGES)  # type: ignore[arg-type]
