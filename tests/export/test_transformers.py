"""Folders that transformers loads compute, write and train as mmrec does."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import NGRAM_HASH
from mmrec.data.tokenizer import EOT
from mmrec.export.safetensors import export_safetensors, import_folder
from mmrec.export.transformers import export_transformers
from mmrec.model import Model
from tests.conftest import ROOT
from tests.export.test_safetensors import NAMES, assert_equal, parameters

transformers = pytest.importorskip("transformers")

Open = Callable[..., Any]
COMPUTED_BY = ("kernels", "torch")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code of exports goes to no cache of the user, and small models get one thread."""
    from transformers import dynamic_module_utils

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "transformers_code"
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(
    checkpoints: dict[str, LoadedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An export of each checkpoint."""
    root = tmp_path_factory.mktemp("exports")
    for name, loaded in checkpoints.items():
        export_transformers(loaded, root / name)
    return {name: root / name for name in checkpoints}


def open_model(folder: Path, computed_by: str = "kernels", **options: Any) -> Any:
    """Load the model of a folder, for inference, with mmrec's kernels or without."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )
    module = sys.modules[type(model).__module__]
    assert module.__name__.startswith("transformers_modules.")
    from mmrec import kernels

    module.kernels = kernels if computed_by == "kernels" else None  # type: ignore[attr-defined]
    return model.eval()


def open_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def make_tokens(loaded: LoadedModel, *shape: int) -> Tensor:
    return torch.randint(1, loaded.model.config.vocab_size - 1, shape)


def loss_and_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter by its name in ``mmrec.model``."""
    loss.backward()
    found = {"loss": loss.detach()}
    for name, p in model.named_parameters():
        name = name.removeprefix("model.").removeprefix("embed_tokens.weight") or "embedding"
        assert p.grad is not None
        found[name.removesuffix(".weight") if "ngram" in name else name] = p.grad
    return found


@pytest.mark.parametrize("computed_by", COMPUTED_BY)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same(
    name: str, computed_by: str, checkpoints: dict[str, LoadedModel], folders: dict[str, Path]
) -> None:
    """In one call, and in calls that continue with the cache."""
    loaded, model = checkpoints[name], open_model(folders[name], computed_by)
    tokens = make_tokens(loaded, 2, 21)
    with torch.no_grad():
        expected = loaded.model(tokens)[0]
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        cache, parts = None, []
        for part in tokens.split((9, 1, 1, 10), 1):
            result = model(part, cache=cache)
            cache, parts = result.cache, [*parts, result.logits]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 21


@pytest.mark.parametrize("computed_by", COMPUTED_BY)
def test_gradients_are_the_same(
    computed_by: str, checkpoints: dict[str, LoadedModel], folders: dict[str, Path]
) -> None:
    """With activation checkpointing, too."""
    loaded, model = checkpoints["byte"], open_model(folders["byte"], computed_by)
    tokens = make_tokens(loaded, 2, 19)
    loaded.model.zero_grad()
    loss, _ = loaded.model.loss(tokens[:, :-1], tokens[:, 1:])
    expected = loss_and_gradients(loaded.model, loss)
    loaded.model.zero_grad()
    results = [loss_and_gradients(model, model(tokens, labels=tokens).loss)]
    model.activation_checkpointing_enable()
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)  # checkpointing is for training
    model.model.config.dropout = 0.0
    model.zero_grad()
    results.append(loss_and_gradients(model, model(tokens, labels=tokens).loss))
    for found in results:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("computed_by", COMPUTED_BY)
@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_mmrec_generate(
    name: str, computed_by: str, checkpoints: dict[str, LoadedModel], folders: dict[str, Path]
) -> None:
    model, tokenizer = open_model(folders[name], computed_by), open_tokenizer(folders[name])
    for prompt in ("", "def f", "class "):
        expected = checkpoints[name].generate(prompt, temperature=0, max_tokens=30)
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=30, do_sample=False)
        text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == expected


@pytest.mark.parametrize("name", ["bpe", "byte", "char"])
def test_the_tokenizer_is_ours(
    name: str, checkpoints: dict[str, LoadedModel], folders: dict[str, Path], text_file: Path
) -> None:
    """After an end token; the letters of the token are letters where the tokenizer has them."""
    ours, theirs = checkpoints[name].tokenizer, open_tokenizer(folders[name])
    text = text_file.read_text(encoding="utf-8") + EOT.replace("|", "|" * (name != "char"))
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == [ours.eot, *ids]
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot
    assert len(theirs) == ours.vocab_size
    # it is made of no code in the folder
    untrusted = transformers.AutoTokenizer.from_pretrained(folders[name], trust_remote_code=False)
    assert untrusted(text)["input_ids"] == [ours.eot, *ids]


@pytest.mark.parametrize("computed_by", COMPUTED_BY)
def test_padding_on_the_left_changes_nothing(
    computed_by: str, checkpoints: dict[str, LoadedModel], folders: dict[str, Path]
) -> None:
    """Rows of different lengths are written as each is alone; with beams and several texts, too."""
    model, tokenizer = open_model(folders["bpe"], computed_by), open_tokenizer(folders["bpe"])
    prompts = ["def f", "class Message:\n    pass", ""]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    for beams in (1, 3):
        together = model.generate(
            **tokenizer(prompts, return_tensors="pt", padding=True), num_beams=beams, **options
        )
        for prompt, row in zip(prompts, together, strict=True):
            ids = tokenizer(prompt, return_tensors="pt")
            alone = model.generate(**ids, num_beams=beams, **options)
            assert torch.equal(row[-12:], alone[0, -12:])
            without_cache = model.generate(**ids, num_beams=beams, use_cache=False, **options)
            assert torch.equal(alone, without_cache)


def test_padding_on_the_right(
    checkpoints: dict[str, LoadedModel], folders: dict[str, Path]
) -> None:
    """It leaves logits as they are, and is refused where it would spoil the cache."""
    model, tokens = open_model(folders["byte"]), make_tokens(checkpoints["byte"], 2, 9)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    result = model(tokens, attention_mask=mask)
    torch.testing.assert_close(result.logits[0, :6], model(tokens[:1, :6]).logits[0])
    torch.testing.assert_close(result.logits[1], model(tokens[1:]).logits[0])
    assert result.cache is None
    with pytest.raises(ValueError, match="zeros on the left where a cache is kept; got zeros on"):
        model(tokens, attention_mask=mask, use_cache=True)
    mask[0, 7] = 1
    with pytest.raises(ValueError, match="at the ends of a row; got zeros between ones"):
        model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="input_ids must be given, and inputs_embeds must not"):
        model(inputs_embeds=torch.zeros(1, 2, 24))


def test_generation_goes_on_from_a_cache(folders: dict[str, Path]) -> None:
    model, tokenizer = open_model(folders["char"]), open_tokenizer(folders["char"])
    ids = tokenizer("class ", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = model.generate(ids, max_new_tokens=12, **options)
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **options)
    again = model.generate(first.sequences, cache=first.cache, max_new_tokens=7, **options)
    assert torch.equal(again, whole)
    with pytest.raises(ValueError, match="must hold the 18 tokens that the cache has seen"):
        model.generate(ids, cache=first.cache, max_new_tokens=1, **options)


def test_a_pipeline_writes_text(
    checkpoints: dict[str, LoadedModel], folders: dict[str, Path]
) -> None:
    write = transformers.pipeline("text-generation", folders["bpe"], trust_remote_code=True)
    [first, second] = write(["def f", "class"], do_sample=False, max_new_tokens=9, batch_size=2)
    for prompt, result in (("def f", first), ("class", second)):
        text = checkpoints["bpe"].generate(prompt, temperature=0, max_tokens=9)
        assert result[0]["generated_text"] == prompt + text


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Texts of different lengths as token ids."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        pieces = [text[i * 50 : i * 50 + 20 + 5 * i] for i in range(8)]
        self.rows = [dict(tokenizer(piece)) for piece in pieces]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def fit(model: Any, tokenizer: Any, text: str, folder: Path) -> tuple[float, float]:
    """Train a few steps with transformers' Trainer; return the loss before and after."""
    data = Texts(tokenizer, text)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data,
        eval_dataset=data,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def test_the_trainer_trains_it_and_mmrec_takes_it_back(
    folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = open_model(folders["bpe"]), open_tokenizer(folders["bpe"])
    before, after = fit(model, tokenizer, text_file.read_text(encoding="utf-8"), tmp_path / "run")
    assert after < before - 0.5
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = import_folder(tmp_path / "saved")
    assert loaded.step == 0  # what mmrec knew of the training does not hold for these weights
    tokens = make_tokens(loaded, 1, 20)
    with torch.no_grad():
        expected = open_model(tmp_path / "saved")(tokens).logits
        assert torch.equal(expected, model.eval()(tokens).logits)
        torch.testing.assert_close(loaded.model(tokens)[0], expected, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer.to_json() == import_folder(folders["bpe"]).tokenizer.to_json()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_lora_of_peft(
    checkpoints: dict[str, LoadedModel], folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    """It trains the factors alone, and its merged weights come back."""
    peft = pytest.importorskip("peft")
    model, tokenizer = open_model(folders["byte"]), open_tokenizer(folders["byte"])
    names = ["in_proj", "out_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 4
    assert all("lora_" in name for name in trained)
    text = text_file.read_text(encoding="utf-8")
    before, after = fit(adapted, tokenizer, text, tmp_path / "run")
    assert after < before - 0.2
    ids = tokenizer("def", return_tensors="pt")
    written = adapted.generate(**ids, max_new_tokens=9, do_sample=False)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = import_folder(tmp_path / "saved")
    assert torch.equal(
        parameters(loaded)["embedding"], parameters(checkpoints["byte"])["embedding"]
    )
    text = loaded.generate("def", temperature=0, max_tokens=9)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == f"def{text}"


def test_half_precision(checkpoints: dict[str, LoadedModel], folders: dict[str, Path]) -> None:
    """Products in bfloat16, recurrences in float32, with the kernels and without."""
    tokens = make_tokens(checkpoints["byte"], 2, 15)
    results = []
    for computed_by in COMPUTED_BY:
        model = open_model(folders["byte"], computed_by, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            results.append(model(tokens).logits)
    exact = checkpoints["byte"].model(tokens)[0].detach()
    assert results[0].dtype == torch.float32
    scale = float(exact.abs().mean())
    for result in results:
        assert float((result - exact).abs().mean()) < 0.05 * scale


def test_a_new_model_begins_as_ours(folders: dict[str, Path]) -> None:
    """From the configuration alone, with the same initial weights where they are not random."""
    config = transformers.AutoConfig.from_pretrained(folders["byte"], trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    ours = Model(import_folder(folders["byte"]).model.config)
    for name, expected in ours.named_parameters():
        name = {"embedding": "embed_tokens.weight"}.get(name, name)
        name = {"ngram_embedding": "ngram_embedding.weight"}.get(name, name)
        found = model.model.get_parameter(name)
        if expected.std() == 0 or expected.ndim == 1 or "conv_weight" in name:
            assert torch.equal(found, expected), name
        else:
            assert 0.8 < float((found.std() / expected.std()).detach()) < 1.25, name


def test_the_files_stand_alone(
    checkpoints: dict[str, LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mmrec is not installed, torch computes."""
    export_transformers(checkpoints["byte"], tmp_path / "alone")
    with monkeypatch.context() as patch:
        for name in [n for n in sys.modules if n.split(".")[0] == "mmrec"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "mmrec", None)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "alone", trust_remote_code=True
        ).eval()
    module = sys.modules[type(model).__module__]
    assert module.kernels is None  # type: ignore[attr-defined]
    assert module.NGRAM_HASH == NGRAM_HASH  # type: ignore[attr-defined]
    tokens = make_tokens(checkpoints["byte"], 1, 20)
    expected = checkpoints["byte"].model(tokens)[0]
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_base_model_gives_hidden_states(
    checkpoints: dict[str, LoadedModel], folders: dict[str, Path]
) -> None:
    model = transformers.AutoModel.from_pretrained(folders["byte"], trust_remote_code=True).eval()
    tokens = make_tokens(checkpoints["byte"], 2, 7)
    with torch.no_grad():
        result = model(tokens, output_hidden_states=True)
        expected, _ = checkpoints["byte"].model.hidden_states(tokens)
    torch.testing.assert_close(result.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert len(result.hidden_states) == 5
    assert result.hidden_states[-1] is result.last_hidden_state


@pytest.mark.parametrize("title", ["safetensors", "transformers"])
def test_the_examples_of_the_guide(
    title: str,
    checkpoints: dict[str, LoadedModel],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs/guides/export.md").read_text(encoding="utf-8")
    [program] = re.findall(rf"^## {title}\n(?:.(?!^##))*?^```python\n(.*?)^```", page, re.M | re.S)
    export_safetensors(checkpoints["bpe"], tmp_path / "tiny-safetensors")
    export_transformers(checkpoints["bpe"], tmp_path / "tiny-transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "export.md", "exec"), {})
    printed = capsys.readouterr().out
    if title == "safetensors":
        ids = checkpoints["bpe"].tokenizer.encode("It was").tolist()
        assert printed == f"{ids} It was\n"
    else:
        prompts = ["It was", "The"]
        texts = checkpoints["bpe"].generate(prompts, temperature=0, max_tokens=20)
        assert printed == f"{[p + t for p, t in zip(prompts, texts, strict=True)]}\n"


def test_the_folder_says_what_it_is(folders: dict[str, Path]) -> None:
    stored = json.loads((folders["lora"] / "config.json").read_text())
    assert stored["layer_pattern"] == "nslb"
    assert {p.name for p in folders["lora"].iterdir()} == {
        *("config.json", "configuration_mmrec.py", "generation_config.json", "model.safetensors"),
        *("modeling_mmrec.py", "tokenizer.json", "tokenizer_config.json"),
    }
    assert_equal(import_folder(folders["lora"]), import_folder(folders["lora"]))
