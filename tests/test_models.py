"""Models to measure: by name, from files' headers, from factories."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusedopt.models import MODELS, ModelError, find, from_factory, from_file


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2-124m", 148, 124_439_808),
        ("gpt2-1.5b", 580, 1_557_611_200),
        ("llama-7b", 291, 6_738_415_616),
        ("resnet50", 161, 25_557_032),
        ("1x50M", 1, 50_000_000),
        ("3000x3500", 3000, 10_500_000),
    ],
)
def test_models_are_what_they_are_named_after(name: str, tensors: int, elements: int) -> None:
    model = find(name)
    assert model is MODELS[name]
    assert (len(model.shapes), model.elements) == (tensors, elements)


def safetensors(path: Path, header: Any, *, length: int | None = None) -> Path:
    """A file of that format: a header's length in 8 bytes, the header; the data is left out."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    return path


def test_of_a_safetensors_file_the_header_is_enough(tmp_path: Path) -> None:
    entry = {"data_offsets": [0, 10**12]}
    path = safetensors(
        tmp_path / "large.safetensors",
        {
            "__metadata__": {"format": "pt"},
            "embedding": {"dtype": "BF16", "shape": [50000, 2000], **entry},
            "scale": {"dtype": "F32", "shape": [], **entry},
            "positions": {"dtype": "I64", "shape": [2000], **entry},
            "quantized": {"dtype": "F8_E4M3", "shape": [16], **entry},
        },
    )
    model = find(str(path))
    assert model.name == "large.safetensors"
    assert model.shapes == ((50000, 2000), ())  # what is not trained is left out
    assert model.dtypes == (torch.bfloat16, torch.float32)
    assert model.elements == 100_000_001


@pytest.mark.parametrize("content", [b"", b"\x08\0\0", struct.pack("<Q", 5) + b"{}"])
def test_truncated_safetensors_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        from_file(path)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"a": {"dtype": "F32", "shape": 3}},
        {"a": {"shape": [3]}},
    ],
)
def test_corrupt_safetensors_headers_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(ModelError, match="not a safetensors file"):
        from_file(safetensors(tmp_path / "a.safetensors", header))


def test_no_more_is_read_than_there_is(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", {}, length=2**63)
    with pytest.raises(ModelError, match="its header is longer than the file"):
        from_file(path)


def test_a_checkpoint_with_its_optimizer_counts_parameters_once(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(4)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, path)
    assert find(str(path)).shapes == ((3, 4), (3,))


def test_a_state_dict_without_counters(tmp_path: Path) -> None:
    net = nn.BatchNorm1d(4).bfloat16()  # its num_batches_tracked is an integer
    torch.save(net.state_dict(), tmp_path / "norm.pt")
    model = from_file(tmp_path / "norm.pt")
    assert model.shapes == 4 * ((4,),)
    assert set(model.dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, {"ids": torch.arange(3)}])
def test_checkpoints_without_trained_tensors_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="no tensors of floating-point numbers"):
        from_file(tmp_path / "a.pt")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ModelError, match="not a torch checkpoint"):
        find(str(tmp_path / "a.txt"))
    with pytest.raises(ModelError, match="not a file"):
        find(str(tmp_path))
    with pytest.raises(ModelError, match=r"b\.safetensors: no such file"):
        find(str(tmp_path / "b.safetensors"))
    with pytest.raises(ModelError, match=r"no model 'nonsense'.*gpt2-124m"):
        find("nonsense")


FACTORIES = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(8)

def huge(): return nn.Linear(10**6, 10**6)
def half(): return nn.Linear(2, 2, dtype=torch.float16)
def parameters(): return nn.Linear(2, 3).parameters()
def groups(): return [{"params": [nn.Parameter(torch.ones(2))], "lr": 1.0}]
def number(): return 3
def nothing(): return nn.ReLU()
def broken(): raise RuntimeError("no config")
class nested:
    tied = Tied
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the folder that one is in."""
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which find() adds the folder to
    sys.modules.pop("my_factories", None)


@pytest.mark.parametrize(
    ("name", "shapes", "dtype"),
    [
        ("Tied", ((50, 8), (50,), (8,), (8,)), torch.float32),  # without buffers, the tie once
        ("nested.tied", ((50, 8), (50,), (8,), (8,)), torch.float32),
        ("huge", ((10**6, 10**6), (10**6,)), torch.float32),  # no memory is taken
        ("half", ((2, 2), (2,)), torch.float16),
        ("parameters", ((3, 2), (3,)), torch.float32),
        ("groups", ((2,),), torch.float32),
    ],
)
def test_factories(factories: None, name: str, shapes: Any, dtype: torch.dtype) -> None:
    model = find(f"my_factories:{name}")
    assert model.name == f"my_factories:{name}"
    assert model.shapes == shapes
    assert set(model.dtypes) == {dtype}


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("my_factories:number", "returned int, which is no module and no parameters"),
        ("my_factories:nothing", "returned no tensors of floating-point numbers"),
        ("my_factories:broken", "RuntimeError: no config"),
        ("my_factories:gone", "AttributeError"),
        ("no_such_module:net", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_factories_that_give_no_model(factories: None, what: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        from_factory(what)
