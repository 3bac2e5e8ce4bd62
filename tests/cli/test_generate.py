"""``mmrec generate``: many prompts, samples, JSON lines, biases; and a process without torch."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec.checkpoint.checkpoint import load_model, save_checkpoint
from mmrec.data.tokenizer import train_tokenizer
from mmrec.inference.decoder import Decoder
from mmrec.model import Model
from tests.cli.test_cli import call_words
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens are words and parts of words."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", ["the cat sat on the mat, the cat is on a hat. "], 257 + 20)
    model = Model(replace(SMALL, vocab_size=tokenizer.vocab_size))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    path = tmp_path_factory.mktemp("model") / "model.h5"
    save_checkpoint(path, model, tokenizer, 1, {})
    return path


class Command:
    """Runs ``mmrec generate`` in this process."""

    def __init__(
        self, path: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._path, self._patch, self._capsys = path, patch, capsys

    def __call__(self, *words: str, given: str | None = None) -> str:
        """Return what is printed on standard output; ``error`` holds standard error."""
        if given is not None:
            self._patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        code = call_words(self._patch, ["generate", str(self._path), *words])
        out, self.error = self._capsys.readouterr()
        assert code == 0, self.error
        return out

    def json(self, *words: str, given: str | None = None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*words, "--json", given=given).splitlines()]


@pytest.fixture
def generate(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return Command(path, monkeypatch, capsys)


def test_samples_of_prompts_are_those_of_their_seeds_alone(
    generate: Command, tmp_path: Path
) -> None:
    """In order, as JSON and as text; the seed of a line repeats it."""
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n\nthe mat\nthe cat\n")
    options = ("--max-tokens", "9", "--temperature", "1.3")
    lines = generate.json("--prompts", str(file), "--samples", "2", "--seed", "5", *options)
    assert [(line["prompt_index"], line["sample_index"]) for line in lines] == [
        (prompt, sample) for prompt in range(3) for sample in range(2)
    ]
    assert [line["seed"] for line in lines] == list(range(5, 11))
    assert [line["prompt"] for line in lines[::2]] == ["the cat", "the mat", "the cat"]
    assert len({tuple(line["tokens"]) for line in lines}) == 6
    for line in lines:
        words = ("--prompt", line["prompt"], "--seed", str(line["seed"]), *options)
        assert generate(*words) == f"{line['prompt']}{line['text']}\n"
        [alone] = generate.json(*words)
        place = {"prompt_index": line["prompt_index"], "sample_index": line["sample_index"]}
        assert alone | place == line
    two = ("--prompts", "-", "--samples", "2", "--seed", "5", *options)
    shown = generate(*two, given=file.read_text())
    assert shown == "\n".join(
        f"==> prompt {i // 2 + 1}, sample {i % 2 + 1}, seed {line['seed']} <==\n"
        f"{line['prompt']}{line['text']}\n"
        for i, line in enumerate(lines)
    )
    drawn = generate.json("--prompt", "the", "--samples", "2", *options)
    [again] = generate.json("--prompt", "the", "--seed", str(drawn[1]["seed"]), *options)
    assert again["tokens"] == drawn[1]["tokens"] != drawn[0]["tokens"]


def test_log_probabilities_in_json(generate: Command, path: Path) -> None:
    words = ("--prompt", "the cat", "--max-tokens", "6", "--seed", "1", "--temperature", "2")
    [plain] = generate.json(*words)
    assert "logprobs" not in plain
    [drawn_only] = generate.json(*words, "--logprobs", "0")
    [line] = generate.json(*words, "--logprobs", "3")
    assert plain.items() < drawn_only.items() < line.items()
    assert "top_logprobs" not in drawn_only
    loaded = load_model(path)
    ids = loaded.tokenizer.encode("the cat").tolist()
    with torch.no_grad():
        logits, _ = loaded.model(torch.tensor([[0, *ids, *line["tokens"]]]))
    log_p = torch.log_softmax(logits[0].double(), -1)[len(ids) :]
    for i, token in enumerate(line["tokens"]):
        assert line["logprobs"][i] == pytest.approx(log_p[i, token].item(), abs=1e-3)
        best = log_p[i].topk(3)
        assert [top["token"] for top in line["top_logprobs"][i]] == best.indices.tolist()
        found = [top["logprob"] for top in line["top_logprobs"][i]]
        assert found == pytest.approx(best.values.tolist(), abs=1e-3)
        texts = [top["text"] for top in line["top_logprobs"][i]]
        assert texts == [loaded.tokenizer.decode([t]) for t in best.indices.tolist()]


def test_a_bias_by_id_and_by_text(generate: Command, path: Path) -> None:
    tokenizer = load_model(path).tokenizer
    [the] = tokenizer.encode("the").tolist()
    common = ("--prompt", "a", "--max-tokens", "3", "--seed", "1")
    for name in (str(the), '"the"', '"\\u0074he"'):
        assert generate(*common, "--logit-bias", f"{name}=100") == "athethethe\n"
    [other] = tokenizer.encode("=").tolist()
    both = ("--logit-bias", '"="=99', "--logit-bias", f"{the}=-100")
    assert generate.json(*common, *both)[0]["tokens"] == [other] * 3


def test_options_reach_the_decoder(generate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given, load = [], Decoder.load

    def noting(path: Path, **options: Any) -> Decoder:
        given.append(options)
        return load(path)

    monkeypatch.setattr(Decoder, "load", noting)
    generate("--prompt", "a", "--max-tokens", "1", "--weights", "int8", "--threads", "2")
    generate("--prompt", "a", "--max-tokens", "1")
    assert given == [{"weights": "int8", "threads": 2}, {}]
    words = ("--prompt", "a", "--max-tokens", "40", "--temperature", "0")
    penalties = [(), ("--frequency-penalty", "2"), ("--presence-penalty", "2")]
    kinds = [len(set(generate.json(*words, *penalty)[0]["tokens"])) for penalty in penalties]
    assert kinds[0] < min(kinds[1:])


def test_broken_records_are_counted(generate: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the"}\nbroken\n{"prompt": ""}\n')
    words = ("--prompts", str(file), "--max-tokens", "2")
    lines = generate.json(*words, "--skip-bad")
    assert [line["prompt"] for line in lines] == ["the", ""]
    assert generate.error.startswith("note    records and files skipped: 1, the first because ")
    assert "line 2" in generate.error
    file.write_text('{"q": "the"}\n')
    assert len(generate.json(*words, "--text-field", "q")) == 1
    assert generate.error == ""


def test_generating_imports_no_torch(path: Path) -> None:
    """In the process of each form of the command."""
    code = (
        "import sys\nfrom mmrec.cli import main\n"
        "try: main.run()\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    for words in (["--prompt", "the"], ["--prompts", "-", "--json", "--samples", "2"]):
        command = ["generate", str(path), "--max-tokens", "2", "--seed", "1", *words]
        ended = subprocess.run(
            [sys.executable, "-c", code, *command],
            input="a\nb\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        assert len(ended.stdout.splitlines()) == (1 if "--prompt" in words else 4)


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_ends_between_two_lines(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the\n" * 1000)
    words = ["generate", str(path), "--prompts", str(file), "--json", "--max-tokens", "500"]
    command = [sys.executable, "-m", "mmrec", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        # not communicate(), which does not see what readline() has read beyond the line
        rest, errors = process.stdout.read(), process.stderr.read()
    assert (process.returncode, errors) == (130, b"")
    lines = [json.loads(line) for line in (first + rest).splitlines()]
    assert [line["prompt_index"] for line in lines] == list(range(len(lines)))
    assert 0 < len(lines) < 1000


FIRST_RUN = """
import atexit, sys
from mmrec.cli.main import run
atexit.register(lambda: print("numba" in sys.modules, file=sys.stderr))
run()
"""


def test_the_first_text_waits_for_no_compiler(
    generate: Command, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty cache of kernels, the command writes what the kernel writes, without Numba."""
    words = ("--prompt", "the cat", "--max-tokens", "40", "--seed", "3", "--temperature", "1.5")
    run = subprocess.run(
        [sys.executable, "-c", FIRST_RUN, "generate", str(path), *words],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    assert (run.stderr.strip(), list(tmp_path.iterdir())) == (b"False", [])
    monkeypatch.setattr("mmrec.inference.decoder_choice.kernel_is_ready", lambda: True)
    assert run.stdout.decode() == generate(*words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--prompt the --samples 2 --max-tokens 512 --stop a --json --logprobs 1", "NumpyDecoder"),
        ("--prompt the --samples 2 --max-tokens 513 --stop a", "Decoder"),
        ("--prompt the --max-tokens 4 --weights int8", "Decoder"),
        ("--prompt the --max-tokens 4 --threads 1", "Decoder"),
        ("--prompt the --max-tokens 4 --save-state state.h5", "Decoder"),
        ("--prompt the --max-tokens 4 --read prompts.txt", "Decoder"),
        ("--prompts prompts.txt --max-tokens 4", "Decoder"),
    ],
)
def test_what_is_written_without_the_kernel(
    generate: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    expected: str,
) -> None:
    """Where it is not compiled: little text, and no option that is for the kernel."""
    loaded = []
    load = Decoder.load.__func__  # type: ignore[attr-defined]

    def note(cls: type[Decoder], path: Path, **options: Any) -> Any:
        loaded.append(cls.__name__)
        return load(cls, path)

    monkeypatch.setattr("mmrec.inference.decoder_choice.kernel_is_ready", lambda: False)
    monkeypatch.setattr(Decoder, "load", classmethod(note))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("the cat sat on the mat " * 180 + "\n")
    generate(*words.split())
    assert loaded == [expected]
