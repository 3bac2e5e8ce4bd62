"""The examples of the guide run as they stand there."""

import re
from collections.abc import Iterator

import pytest

from mmrec.integrations import shims
from mmrec.integrations import transformers as integration
from tests.conftest import ROOT

pytest.importorskip("transformers")

PAGE = (ROOT / "docs" / "guides" / "other-models.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _taken_back() -> Iterator[None]:
    yield
    integration.disable()
    shims.uninstall()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES[number], f"example {number + 1}", "exec"), {})
    expected = ["torch_chunk_gated_delta_rule", "mamba_selective_scan", "mmrec stands in for"]
    assert expected[number] in capsys.readouterr().out
