"""The page about a run: what it says, that it loads and runs nothing, how a browser shows it."""

import html
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mmrec.checkpoint.outputs import RUN_MARK
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.runtime.locking import FolderLock
from mmrec.training.report import SHOWN_SAMPLES, _spread, render_report, write_report
from tests.conftest import make_trainer
from tests.server.browser import CHROMIUM, Browser

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=evil()>&\"'\x1b[31m"
OUTSIDE = ("src", "href", "action", "formaction", "poster", "data", "srcset")
"""Attributes that load or lead somewhere."""


class Page(HTMLParser):
    """The elements and the text of a page.

    Attributes:
        tags: names of the elements.
        links: values of attributes that load something.
        handlers: names of attributes that run something.
        rows: cells of table rows.
        texts: the text of each ``pre`` and ``code``.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self._open = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name.split(":")[-1] in OUTSIDE:
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("pre", "code"):
            self.texts.append("")
        if tag in ("td", "th", "pre", "code"):
            self._open = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._open:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-book"
    make_trainer(corpus, folder, lr=5e-3, eval_every=1).fit()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "runs/tiny-book"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_tells_what_the_files_of_the_run_hold(run: Path) -> None:
    source = render_report(run)
    assert source.startswith(RUN_MARK)
    page = Page(source)
    summary = json.loads((run / "summary.json").read_text())
    for figure in (f"{summary['best_val_loss']:.4f}", f"{summary['tokens_per_second']:,}"):
        assert f"<dd>{figure}</dd>" in source
    validations = [x for x in lines(run / "metrics.jsonl") if x["kind"] == "val"]
    assert len(validations) == 12
    for v in validations:
        assert [f"{v['step']:,}", f"{v['loss']:.4f}", f"{v['bits_per_byte']:.4f}"] in page.rows
    samples = lines(run / "samples.jsonl")
    assert samples[0]["prompt"] in page.texts
    assert all(sample["text"] in page.texts for sample in samples)
    assert source.count("<article>") == len(_spread(12, SHOWN_SAMPLES)) + len(samples)
    assert f"mmrec train --resume {run} --minutes +60" in page.texts
    assert f'mmrec generate {run} --prompt "..."' in page.texts
    assert ["--lr", "0.005", "0.01"] in page.rows
    assert not any(row[0] == "--matrix-lr" for row in page.rows)
    assert ["--width", "32", "128"] in page.rows
    assert (run / "config.toml").read_text() in page.texts
    train_tokens = 12 * 64 / summary["epochs"][0]["epoch"]
    [told] = [row[1] for row in page.rows if row[0] == "training tokens"]
    assert int(told.replace(",", "")) == pytest.approx(train_tokens, rel=0.05)
    assert any(row[0] == "processor" for row in page.rows)


def test_the_page_is_one_file_and_runs_nothing(run: Path) -> None:
    """No name and no text of a run or of a user becomes markup."""
    samples = run / "samples.jsonl"
    changed = [x | {"text": EVIL, "prompt": EVIL} for x in lines(samples)]
    samples.write_text("".join(json.dumps(x) + "\n" for x in changed))
    toml = run / "config.toml"
    text = re.sub("(?m)^source = .*$", "source = '''\n" + EVIL[:-5] + "'''", toml.read_text())
    toml.write_text(text)
    summary = json.loads((run / "summary.json").read_text()) | {"best_reason": EVIL}
    (run / "summary.json").write_text(json.dumps(summary))
    evil_run = run.rename(run.with_name("<b onclick=x>&'\""))
    source = render_report(evil_run)
    page = Page(source)
    assert not {"script", "img", "b", "iframe", "link", "object", "form"} & set(page.tags)
    assert page.handlers == []
    assert all(link.startswith("#") for link in page.links)  # inside the picture
    assert EVIL in page.texts
    assert "url(http" not in source
    assert "default-src 'none'" in source
    assert "script-src" not in source


def test_a_run_of_an_earlier_version(run: Path) -> None:
    """Without texts, status.json and new settings, and with settings that are gone now."""
    for name in ("samples.jsonl", "status.json"):
        (run / name).unlink()
    toml = run / "config.toml"
    text = "".join(x for x in toml.read_text().splitlines(keepends=True) if "sample_" not in x)
    toml.write_text(text.replace("[optimizer]\n", "[optimizer]\nmomentum = 0.9\n"))
    source = render_report(run)
    assert "This run wrote no texts." in source
    assert "momentum = 0.9" in source
    assert ["--lr", "0.005", "0.01"] in Page(source).rows
    for path in (*run.glob("*.h5"), run / "summary.json", toml):
        path.unlink()
    source = render_report(run)
    assert "not running, and it did not end by itself" in source
    assert "generate" not in source  # there is no model
    (run / "metrics.jsonl").write_text("")
    assert "No step was taken yet." in render_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read .*metrics.jsonl: No such file"):
        render_report(run)


def test_a_run_in_progress(run: Path) -> None:
    """Its last lines may be cut. The page can be written while another process has the lock."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 13, "ki')
    with FolderLock(run):
        write_report(run, run / "report.html")
    source = (run / "report.html").read_text()
    assert f"running, process {os.getpid()}" in source
    texts = Page(source).texts
    assert f"mmrec status {run} --watch" in texts
    assert not any("--resume" in text for text in texts)


def test_what_to_do_after_each_end(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    resume = f"mmrec train --resume {run}"
    for ended, commands in (
        ("done", [f"{resume} --minutes +60"]),
        ("signal", [resume, f"{resume} --minutes +60"]),
        ("early", [f"{resume} --minutes +60 --patience 0"]),
    ):
        (run / "summary.json").write_text(json.dumps(summary | {"ended": ended}))
        assert [x for x in Page(render_report(run)).texts if "--resume" in x] == commands


def test_texts_are_spread_over_the_run() -> None:
    assert _spread(3, 8) == [0, 1, 2]
    for count in (9, 30, 1000):
        places = _spread(count, 8)
        assert (places[0], places[-1]) == (0, count - 1)
        assert len(places) <= 8
        assert places == sorted(set(places))


def test_a_picture_that_fails_is_told_in_its_place(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fail(*arguments: Any, **options: Any) -> None:
        raise ValueError("no <font>")

    monkeypatch.setattr(Figure, "savefig", fail)
    source = render_report(run)
    assert html.escape("could not draw the picture: no <font>") in source
    assert "Next" in source


def test_the_command_and_the_setting_write_the_page(
    corpus: Corpus,
    run: Path,
    tmp_path: Path,
    run_command: Callable[..., tuple[str, str]],
) -> None:
    """A page replaces a page, and no other file without --force."""
    out, _ = run_command(tmp_path, "report")
    assert out.split() == ["report", "runs/tiny-book/report.html"]
    out, _ = run_command(tmp_path, "report", "runs/tiny-book")  # replaces its own
    (tmp_path / "mine.html").write_text("mine")
    run_command(tmp_path, "report", "runs", "--out", "mine.html", code=2)
    assert (tmp_path / "mine.html").read_text() == "mine"
    run_command(tmp_path, "report", "runs", "--out", "mine.html", "--force")
    assert (tmp_path / "mine.html").read_text().startswith(RUN_MARK)
    trainer = make_trainer(corpus, tmp_path / "with", steps=2, html=True)
    trainer.fit()
    source = (tmp_path / "with/report.html").read_text()
    assert "ended: its length was reached" in source
    (tmp_path / "with/report.html").write_text("mine")
    again = make_trainer(corpus, tmp_path / "with", steps=3, html=True)
    assert again.fit(resume=True)["ended"] == "done"
    assert (tmp_path / "with/report.html").read_text() == "mine"
    told = "\n".join(again.lines)  # type: ignore[attr-defined]
    assert "report.html is there already, and mmrec wrote no page of a run there" in told


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (375, "dark")])
def test_a_browser_shows_it(browser: Browser, run: Path, width: int, scheme: str) -> None:
    """On a desk and on a phone, in light and dark: nothing is cut, and all text can be read."""
    samples = run / "samples.jsonl"
    changed = [x | {"text": f"{EVIL} {'long' * 200}"} for x in lines(samples)]
    samples.write_text("".join(json.dumps(x) + "\n" for x in changed))
    write_report(run, run / "report.html")
    browser.errors.clear()
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.call("Emulation.setDeviceMetricsOverride", **screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=features)
    browser.call("Page.navigate", url=(run / "report.html").as_uri())
    browser.wait("document.readyState === 'complete' && document.querySelector('footer')")
    assert browser.run("document.title") == "tiny-book, mmrec"
    assert browser.run("document.documentElement.scrollWidth") <= width
    box = "document.querySelector('svg').getBoundingClientRect()"
    assert browser.run(f"{box}.width") > 0.5 * min(width, 832)
    colour = "getComputedStyle(document.querySelector('{}')).{}"
    letters = browser.run(colour.format("svg text", "fill"))
    assert letters == browser.run(colour.format("body", "color"))
    paper = browser.run(colour.format("body", "backgroundColor"))
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 380) == (scheme == "light")
    browser.run("document.querySelector('details summary').click()")
    assert browser.run("document.querySelector('details').open")
    assert browser.errors == []
