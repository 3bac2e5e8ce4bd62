"""The adapter for lm-evaluation-harness, on tasks of local data, against plain sums."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from mmrec.checkpoint.checkpoint import LoadedModel, save_checkpoint
from mmrec.data.corpus import Corpus
from mmrec.data.dataloader import WindowLoader
from mmrec.model import Model
from mmrec.optimizer import build_optimizer
from tests.conftest import SMALL

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: mmrec[harness]")

CHOICE = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
DOCUMENTS = [
    {"start": "def from", "ends": ["_file(", " zebra", "xxxxxx"], "right": 0},
    {"start": "import", "ends": [" qqqq", " re\n", "@@@@"], "right": 1},
    {"start": "    return self", "ends": ["####", "????", "._parse("], "right": 2},
]


@pytest.fixture(scope="module")
def loaded(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that has seen a little text, so that it writes text."""
    torch.manual_seed(0)
    model = Model(SMALL)
    optimizer, loader = build_optimizer(model), WindowLoader(corpus.train.tokens, 2, 32, 0)
    for step in range(12):
        optimizer.zero_grad()
        model.loss(*loader.batch_at(step))[0].backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("model") / "model.h5"
    save_checkpoint(path, model.eval(), corpus.tokenizer, 12, {})
    return LoadedModel(path, model, corpus.tokenizer, 12, {})


def plain(loaded: LoadedModel, context: str, text: str) -> tuple[float, bool]:
    """Log-probability of a text in float64, all of it at once."""
    ids = [256, *context.encode(), *text.encode()]
    with torch.no_grad():
        logits = loaded.model.double()(torch.tensor([ids[:-1]]))[0][0]
    loaded.model.float()
    logp = torch.log_softmax(logits, -1)[len(context.encode()) :]
    targets = torch.tensor(ids[1:])[len(context.encode()) :]
    return logp.gather(1, targets[:, None]).sum().item(), bool((logp.argmax(1) == targets).all())


def request(*args: object) -> object:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, args, 0)


def test_answers_are_plain_sums(loaded: LoadedModel, corpus: Corpus) -> None:
    from mmrec.evaluation.lm_eval import LmEvalModel

    model = LmEvalModel(loaded)
    long = corpus.tokenizer.decode(corpus.val.tokens[:1500])  # more than one chunk
    pairs = [
        ("def ", "f(x)"),
        ("def ", "g"),
        ("trailing  ", "space"),
        ("", "start"),
        (long, "x"),
        ("a", long),
        ("nothing", ""),
    ]
    made = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, text), (value, greedy) in zip(pairs, made, strict=True):
        bare = context.rstrip()  # spaces between the two belong to what follows
        after = context[len(bare) :] + text
        want, likeliest = plain(loaded, bare, after) if after else (0.0, True)
        assert value == pytest.approx(want, rel=1e-5, abs=1e-4)
        assert greedy == likeliest
    rolling = model.loglikelihood_rolling([request(long), request("é")], disable_tqdm=True)
    for text, value in zip((long, "é"), rolling, strict=True):
        assert value == pytest.approx(plain(loaded, "", text)[0], rel=1e-5)


def test_texts_end_at_the_stops_of_the_task(loaded: LoadedModel) -> None:
    from mmrec.evaluation.lm_eval import LmEvalModel

    model = LmEvalModel(loaded)
    options = [
        {"until": [], "max_gen_toks": 30},
        {"until": "e", "max_gen_toks": 30},
        {"do_sample": True, "temperature": 1.0, "max_gen_toks": 30},
    ]
    whole, cut, drawn = model.generate_until(
        [request("def ", o) for o in options], disable_tqdm=True
    )
    assert len(whole) == 30
    assert cut == whole.split("e")[0]
    assert drawn != whole
    assert plain(loaded, "def ", whole)[1]  # greedy


def test_tasks_of_a_folder(
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lm_eval import tasks as harness

    from mmrec.cli import main

    # the list of the harness's own tasks takes many seconds
    own = partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", own)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (tasks / f"{name}.yaml").write_text(text.format(data=tmp_path / "data.jsonl"))
    command = f"mmrec eval {loaded.path} --tasks words,texts --include-path {tasks} --json"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as caught:
        main.run()
    assert not caught.value.code
    made = json.loads(capsys.readouterr().out)
    right = 0
    for d in DOCUMENTS:
        scores = [plain(loaded, str(d["start"]), str(end))[0] for end in d["ends"]]  # type: ignore[attr-defined]
        right += max(range(3), key=scores.__getitem__) == d["right"]
    assert made["words"]["acc,none"] == pytest.approx(right / 3)
    starts = [str(d["start"]) for d in DOCUMENTS]
    nats = -sum(plain(loaded, "", s)[0] for s in starts)
    bits = nats / torch.log(torch.tensor(2.0)).item() / sum(map(len, starts))
    assert made["texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
