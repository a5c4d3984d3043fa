"""Models to measure: by name, from files' headers, from factories."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_sparse
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


def test_any_number_of_tensors_of_one_size() -> None:
    assert find("465x70k-groups").shapes == 465 * ((70_000,),)
    assert find("465x70k-groups").group_each
    assert find("1x1B").elements == 10**9
    assert find("7x3M").name == "7x3M"
    for name in ("0x3", "3x0", "1x1b", "x64", "1x", "1x64-group", "1 x 64", "١x٢"):
        with pytest.raises(ModelError, match="no model"):
            find(name)


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
    assert model.left_out == "1 tensor of int64, 1 of float8_e4m3fn"


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
        {"a": {"dtype": "F32", "shape": [-3, 4]}},
        {"a": {"dtype": "F32", "shape": [3.5]}},
        {"a": {"dtype": "F32", "shape": [True]}},
        {"a": {"dtype": "F32", "shape": "ab"}},
    ],
)
def test_corrupt_safetensors_headers_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(ModelError, match="not a safetensors file"):
        from_file(safetensors(tmp_path / "a.safetensors", header))


def test_a_header_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000) + 100_000 * b"[")
    with pytest.raises(ModelError, match="not a safetensors file"):
        from_file(path)


def test_no_more_is_read_than_there_is(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", {}, length=2**63)
    with pytest.raises(ModelError, match="its header is longer than the file"):
        from_file(path)


@pytest.mark.parametrize(
    ("names", "shapes"),
    [
        (("model", "optimizer"), ((3, 4), (3,))),
        (("net", "optimizer"), ((3, 4), (3,))),
        (("a", "list"), ((3, 4), (3,))),
    ],
)
def test_a_checkpoint_with_its_optimizer_counts_parameters_once(
    tmp_path: Path, names: tuple[str, str], shapes: Any
) -> None:
    net = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(4)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pt"
    state: Any = optimizer.state_dict()
    if names[1] == "list":
        state = [state]
    torch.save({names[0]: net.state_dict(), names[1]: state, "epoch": 1}, path)
    assert find(str(path)).shapes == shapes
    torch.save(state, path)
    with pytest.raises(ModelError, match="holds an optimizer's state, and no model"):
        find(str(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_weights_count_once(tmp_path: Path, zipped: bool) -> None:
    weight = torch.ones(50, 8)
    halves = torch.ones(2, 8)
    tensors = {"embedding": weight, "head": weight.detach(), "a": halves[0], "b": halves[1]}
    path = tmp_path / "tied.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert from_file(path).shapes == ((50, 8), (8,), (8,))


@needs_sparse
def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3, device="cpu").to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a\.pt: has a tensor that is not dense \(sparse_coo\)"):
        from_file(tmp_path / "a.pt")


def test_a_state_dict_without_counters(tmp_path: Path) -> None:
    net = nn.BatchNorm1d(4).bfloat16()  # its num_batches_tracked is an integer
    torch.save(net.state_dict(), tmp_path / "norm.pt")
    model = from_file(tmp_path / "norm.pt")
    assert model.shapes == 4 * ((4,),)
    assert set(model.dtypes) == {torch.bfloat16}
    assert model.left_out == "1 tensor of int64"


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
    for nonsense in ("nonsense", "", 300 * "x"):
        with pytest.raises(ModelError, match=f"no model '{nonsense}'.*gpt2-124m"):
            find(nonsense)
    with pytest.raises(ModelError, match="no such file"):
        find(300 * "x" + ".safetensors")
    (tmp_path / "mine.py").write_text("")
    for what in (str(tmp_path / "mine.py"), "other.py"):
        with pytest.raises(ModelError, match=r"(mine|other):build calls its function build"):
            find(what)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4asdf", bytes(range(255)) * 4])
def test_broken_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.pt: not a torch checkpoint of tensors$"):
        find(str(tmp_path / "a.pt"))


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"holds a torch\.nn\S+Linear: save model\.state_dict\(\)"):
        find(str(tmp_path / "a.pt"))


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
def wrong(): return nn.Linear("a", 2)
def raising():
    yield nn.Parameter(torch.ones(2))
    raise RuntimeError("no more")
def frozen(): return nn.Linear(2, 3).requires_grad_(False)
def partly():
    net = nn.Linear(2, 3)
    net.weight.requires_grad = False
    return net
net = nn.Linear(4, 1, device="cpu")
class nested:
    tied = Tied
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the folder that one is in."""
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    (tmp_path / "my_program.py").write_text("raise SystemExit(3)")
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
        ("net", ((1, 4), (1,)), torch.float32),  # not a factory, but what one returns
        ("partly", ((3,),), torch.float32),
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
        ("my_factories:number", "gives int, which is no module and no parameters"),
        ("my_factories:nothing", "gives no tensors of floating-point numbers"),
        ("my_factories:broken", r"RuntimeError: no config \(.*my_factories\.py, line \d+\)"),
        ("my_factories:wrong", r"TypeError: .* \(.*my_factories\.py, line \d+\)"),
        ("my_factories:raising", r"RuntimeError: no more \(.*my_factories\.py, line \d+\)"),
        ("my_factories:frozen", r"only 2 tensors frozen \(requires_grad=False\)"),
        ("my_program:net", r"SystemExit: 3 \(.*my_program\.py, line 1\)"),
        ("my_factories:gone", "AttributeError"),
        ("no_such_module:net", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_factories_that_give_no_model(factories: None, what: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        from_factory(what)


def test_what_is_frozen_is_left_out_and_told(factories: None) -> None:
    assert find("my_factories:partly").left_out == "1 tensor frozen (requires_grad=False)"
