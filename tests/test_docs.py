"""The code in the documents runs, and the options' page names every option."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fusedopt.options import ARGUMENTS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_runs(document: Path) -> None:
    """All blocks of a document, one after the other, as a reader would paste them."""
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(document), "exec"), names)


def test_every_option_is_documented() -> None:
    text = (ROOT / "docs" / "pipeline.md").read_text()
    for name in ARGUMENTS:
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
