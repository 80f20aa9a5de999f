"""Reading and writing safetensors: bytes, streaming, and one line for every kind of bad file."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from svd.core.errors import UserError
from svd.model.safetensors import (
    DTYPES,
    Lazy,
    check_fit,
    fill,
    of_module,
    of_tensor,
    read_header_metadata,
    read_tensors,
    write_tensors,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}, path)
    return path


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5),
    dtype=st.sampled_from(sorted(DTYPES)),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory, shapes: list[list[int]], dtype: str) -> None:
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    tensors = {f"t{i}": (torch.rand(shape) * 9).to(DTYPES[dtype]) for i, shape in enumerate(shapes)}
    write_tensors(path, {name: of_tensor(tensor) for name, tensor in tensors.items()}, {"format": "pt", "k": "v"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    ours = read_tensors(path)
    assert all(torch.equal(ours[name].load(), tensor) for name, tensor in tensors.items())
    assert read_header_metadata(path)["k"] == "v"


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {"b": of_tensor(torch.rand(3, 2)), "a": of_tensor(torch.rand(5).half())}
    write_tensors(tmp_path / "1", tensors)
    write_tensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    tensor = torch.rand(3, 4).t()
    write_tensors(tmp_path / "x.safetensors", {"x": of_tensor(tensor)})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def load() -> torch.Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.zeros(1000).as_subclass(Counted)

    lazy = Lazy((1000,), torch.float32, load)
    write_tensors(tmp_path / "x.safetensors", {f"t{i}": lazy for i in range(20)})
    assert most <= 2


@pytest.mark.parametrize("cut", [1, 4, 60, 100])
def test_a_file_cut_short_is_refused(file: Path, cut: int) -> None:
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(UserError, match="cut short") as error:
        read_tensors(file)
    assert file.name in one_line(error)


def test_a_longer_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match="longer than its header says"):
        read_tensors(file)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, struct.pack("<Q", 20) + b"not json at all.. :)"])
def test_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file") as error:
        read_tensors(path)
    one_line(error)


def with_header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the header of a file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("metadata", [["list"], "text", {"svd.config": {"frames": 14}}, None])
def test_odd_metadata_is_one_line(file: Path, metadata: object) -> None:
    with_header(file, lambda header: header | {"__metadata__": metadata})
    with pytest.raises(UserError, match=r"not a safetensors file \(broken header at '__metadata__'\)") as error:
        read_header_metadata(file)
    assert one_line(error).startswith(str(file))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": None}, {"dtype": "F7"}, {"shape": None}, {"shape": "2x3"}, {"shape": [2, -3]}, {"shape": [2, 4]},
        {"data_offsets": [0]}, {"data_offsets": [4, 28]}, {"data_offsets": None},
    ],
)  # fmt: skip
def test_an_odd_entry_is_one_line(file: Path, entry: dict) -> None:
    with_header(file, lambda header: header | {"a": header["a"] | entry})
    with pytest.raises(UserError) as error:
        read_tensors(file)
    assert one_line(error).startswith(str(file))


@pytest.mark.parametrize("change", [lambda header: [header], lambda header: header | {"a": 7}, lambda header: 7])
def test_an_odd_header_is_one_line(file: Path, change: Callable[[dict], object]) -> None:
    with_header(file, change)
    with pytest.raises(UserError, match="not a safetensors file"):
        read_tensors(file)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "disguised.safetensors"])
def test_pickle_is_refused_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    with pytest.raises(UserError, match="pickled checkpoints can run code") as error:
        read_tensors(path)
    one_line(error)


def test_a_wrong_hash_is_refused_and_the_right_one_passes(file: Path) -> None:
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_tensors(file, right.upper()).keys() == {"a", "b"}
    with pytest.raises(UserError, match="wrong sha256") as error:
        read_tensors(file, "0" * 64)
    one_line(error)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "m-2.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    assert read_tensors(index).keys() == {"a", "b"}
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"m-2\.safetensors: no such file"):
        read_tensors(index)
    for text in ("{}", "[]", "{", '{"weight_map": ["m-1.safetensors"]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(UserError, match="not an index"):
            read_tensors(index)


def test_the_diff_names_every_kind_of_mismatch() -> None:
    found = {"b": of_tensor(torch.zeros(2)), "c": of_tensor(torch.zeros(3, 1))}
    with pytest.raises(UserError) as error:
        check_fit({"a": (1,), "c": (3, 2)}, found, "file.safetensors: U-Net")
    message = one_line(error)
    assert message == (
        "file.safetensors: U-Net: 1 missing (a), 1 unexpected (b), 1 misshaped (c is 3x1 instead of 3x2)"
    )


def test_fill_keeps_the_module_strict_typed_and_trainable(file: Path) -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    tensors = {"weight": of_tensor(torch.rand(2, 3)), "bias": of_tensor(torch.rand(2))}
    fill(module, tensors, "x", dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.requires_grad
    assert not module.weight.is_meta
    with pytest.raises(UserError, match=r"1 missing \(bias\)"):
        fill(module, {"weight": tensors["weight"]}, "x")


def test_a_filled_module_does_not_write_into_the_file(file: Path) -> None:
    before = file.read_bytes()
    with torch.device("meta"):
        module = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.empty(2, 3))})
    fill(module, {"a": read_tensors(file)["a"]}, "x")
    with torch.no_grad():
        module["a"].zero_()
    assert file.read_bytes() == before
    assert torch.equal(read_tensors(file)["a"].load(), torch.arange(6.0).view(2, 3))
    assert of_module(module)["a"].nbytes == 24
