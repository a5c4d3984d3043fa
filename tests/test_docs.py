"""The code in the documents runs, links lead somewhere, and what has to be named is named."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import DEVICE

from fusedopt import schedule
from fusedopt.options import ARGUMENTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# Documents without code that can run here (the path within the repository), and why.
WITHOUT_CODE: dict[str, str] = {}


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="documents speak of the CPU, unless they say so")
@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_runs(document: Path) -> None:
    """All blocks of a document, one after the other, as a reader would paste them."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert blocks or name_of(document) in WITHOUT_CODE
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(document), "exec"), names)


def test_the_readme_quotes_the_results() -> None:
    """Every row of its table: milliseconds, and times as long as ours."""
    path = ROOT / "benchmarks" / "results" / "cpu-avx512-2-threads.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    found = {row["case"]: row for row in results if row["optimizer"] == "adamw"}
    rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert {case for case, _ in rows} == found.keys()
    for case, cells in rows:
        *others, ours, limit = cells.split(" | ")
        contenders, relative = found[case]["contenders"], found[case]["time_relative_to_ours"]
        for name, cell in zip(("for-loop", "foreach", "fused", "DeepSpeed"), others, strict=True):
            milliseconds, times = map(float, cell.strip("x)").split(" ("))
            assert milliseconds == pytest.approx(contenders[name]["ms"]["median"], rel=0.01)
            assert times == pytest.approx(relative[name]["median"], rel=0.05)
        assert float(ours.strip("*")) == pytest.approx(contenders["ours"]["ms"]["median"], rel=0.01)
        assert float(limit) == pytest.approx(relative["limit"]["median"], abs=0.01)


def test_the_kernels_numbers_are_those_of_the_machine_code() -> None:
    """Each row of the table in docs/internals.md, and what is said below it."""
    text = (ROOT / "benchmarks" / "results" / "machine-code-sm_90.txt").read_text("utf-8")
    head, columns, *lines = filter(None, text.splitlines())
    assert re.fullmatch(r"sm_90, .* V[\d.]+, \d{4}-\d\d-\d\d, commit [0-9a-f]{40}", head)
    kernels = {}
    for line in lines:
        *numbers, name = line.split(maxsplit=len(columns.split()) - 1)
        kernels[name] = dict(zip(columns.split(), numbers, strict=False))
    assert all((row["stack"], row["st/ld"]) == ("0", "0/0") for row in kernels.values())
    adam = [kernels[f"direct_update_kernel<Adam<float, false>, {i}>"] for i in range(12)]
    page = (DOCS / "internals.md").read_text("utf-8")
    rows = re.findall(r"^\| ([a-z].+?) \| (\d+ \|.+?) \| [^|]+ \|$", page, re.MULTILINE)
    assert [formats for formats, _ in rows] == [
        *("float32", "bfloat16", "bfloat16, remainder", "bfloat16, master"),
        *("float32, 8-bit state", "bfloat16, remainder, 8-bit state"),
    ]
    for (formats, cells), row in zip(rows, adam, strict=False):
        moved, registers, warps, instructions, *issue = cells.split(" | ")
        assert [registers, warps, instructions] == [row["regs"], row["warps"], row["/512"]]
        scales = 16 if "8-bit" in formats else 0  # of two states, read and written
        assert sum(map(int, row["global"].split("/"))) == 8 * int(moved) + scales
        for copied, cell in zip((3.0e12, 4.3e12), issue, strict=True):
            needed = copied / int(moved) * int(instructions) / 512
            assert float(cell) == pytest.approx(needed / (4 * 132 * 1.755e9), abs=0.006)
    more = [int(b["/512"]) - int(a["/512"]) for a, b in zip(adam[:6], adam[6:], strict=True)]
    assert {row["warps"] for row in adam[6:]} == {"24"}
    assert "each has 24 warps and 105 to 135 instructions more" in " ".join(page.split())
    assert 105 <= min(more) <= max(more) <= 135


def test_every_option_is_documented() -> None:
    text = (DOCS / "pipeline.md").read_text(encoding="utf-8")
    for name in ARGUMENTS:
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_site_has_every_document() -> None:
    """The other way round it is mkdocs that checks: `make docs` is strict."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"^ +- .+: (\S+\.md)$", nav, re.MULTILINE)
    assert len(pages) == len(set(pages))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= set(pages)


def test_messages_are_the_librarys_own() -> None:
    """The page on troubles quotes them in headings and tables; "…" stands for what varies."""
    sources = [*(ROOT / "fusedopt").glob("*.py"), *(ROOT / "csrc").glob("*.*")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*f?"', "", code.replace(r"\"", "\0"))  # literals in a row are one
    code = code.replace("\0", '"')
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    messages = re.findall(r"^(?:###|\|) `(.+?)`", page, re.MULTILINE)
    assert messages
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in code, part


def test_the_signatures_of_schedules() -> None:
    """Those in the tables, with what is to be given by keyword. All of the module's are there."""
    page = (DOCS / "training" / "schedules.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| `(\w+)(\(.*?\))` \|", page, re.MULTILINE))
    classes = {name for name in schedule.__all__ if isinstance(getattr(schedule, name), type)}
    assert classes - found.keys() == {"ScheduleLR", "Plateau"}
    for name in classes & found.keys():
        signature = inspect.signature(getattr(schedule, name))
        parameters = [
            each.replace(annotation=each.empty)
            for each in signature.parameters.values()
            if each.name not in ("plateau", "last_epoch")  # of which the page speaks once
        ]
        bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
        assert found[name] == str(bare).replace("'", '"')
