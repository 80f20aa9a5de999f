"""Reading and writing safetensors tensor by tensor, so that no second copy of a model is ever in memory.

A state dict on disk is a mapping from name to `Lazy`: shape and type are known, the data is read when asked for. Only
safetensors is accepted: pickled checkpoints (.ckpt, .bin, .pt) can run code and are refused.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from svd.core.errors import UserError
from svd.core.files import atomic_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = frozenset({".ckpt", ".bin", ".pt", ".pth", ".pkl"})
HASH_BLOCK = 1 << 22
PROGRESS_BYTES = 1 << 30
SHOWN_KEYS = 5


@dataclass(frozen=True)
class Lazy:
    """A tensor that isn't read yet, of known shape and type; `load()` reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def map(self, function: Callable[[Tensor], Tensor]) -> Lazy:
        """Apply `function` when the tensor is read; the new shape and type are found on the meta device."""
        meta = function(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Lazy(tuple(meta.shape), meta.dtype, lambda: function(self.load()))


def of_tensor(tensor: Tensor) -> Lazy:
    """Wrap a tensor in memory."""
    return Lazy(tuple(tensor.shape), tensor.dtype, tensor.detach)


def of_module(module: nn.Module) -> dict[str, Lazy]:
    """Return a module's state dict as Lazy tensors, without a copy."""
    return {key: of_tensor(value) for key, value in module.state_dict().items()}


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Lazy]:
    """Return the tensors of a .safetensors file, or of the files that a `.safetensors.index.json` lists.

    sha256: expected hash of the file (hex). Raises UserError, in one line, for a missing file, another format, pickle,
    a broken header, a file cut short and a wrong hash.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .safetensors file or a folder that holds one")
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    header = read_header(path)
    if sha256 is not None:
        check_hash(path, sha256)
    try:
        handle = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({str(error).splitlines()[0]})") from None
    return {key: _lazy(handle, key, entry, path) for key, entry in header.items() if key != "__metadata__"}


def _read_sharded(path: Path) -> dict[str, Lazy]:
    try:
        names = {Path(name) for name in json.loads(path.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not an index of safetensors shards ('weight_map' is missing or broken)") from None
    tensors: dict[str, Lazy] = {}
    for name in sorted(names):
        tensors |= read_tensors(path.parent / name.name)
    return tensors


def _lazy(handle: Any, key: str, entry: Mapping[str, Any], path: Path) -> Lazy:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UserError(f"{path}: tensor '{key}' has the unsupported type {entry['dtype']}")
    return Lazy(tuple(entry["shape"]), dtype, lambda: handle.get_tensor(key))


def read_header(path: Path) -> dict[str, Any]:
    """Read and check the header of a safetensors file: name to dtype, shape and data_offsets, and `__metadata__`.

    Raises UserError for pickle, other formats, a broken header and a file cut short.
    """
    with path.open("rb") as stream:
        start = stream.read(8)
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") or path.suffix in PICKLES:
            raise UserError(f"{path}: pickled checkpoints can run code and are refused; get the .safetensors file")
        size = path.stat().st_size
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length < 2 or length > 100_000_000:
            raise UserError(f"{path}: not a safetensors file (broken header)")
        text = stream.read(length)
    if len(text) < length:
        raise UserError(f"{path}: cut short: {size} bytes, its header alone needs {8 + length}; download it again")
    try:
        header = json.loads(text)
        _check_header(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file (broken header{_which(error)})") from None
    end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    if size != 8 + length + end:
        word = "cut short" if size < 8 + length + end else "longer than its header says"
        raise UserError(f"{path}: {word}: {size} bytes instead of {8 + length + end}; download it again")
    return header


def _check_header(header: Any) -> None:
    """Raise some error for anything but a header; a KeyError names the bad entry."""
    for key, entry in header.items():
        if key == "__metadata__":
            sound = isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())
        else:
            shape, offsets = entry["shape"], entry["data_offsets"]
            sound = isinstance(entry["dtype"], str) and len(offsets) == 2
            sound = sound and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
        if not sound:
            raise KeyError(key)


def _which(error: Exception) -> str:
    return f" at {error}" if isinstance(error, KeyError) else ""


def read_header_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in a file's header, pairs of text."""
    return dict(read_header(path).get("__metadata__", {}))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file (hex), with a progress bar above 1 GiB."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as stream,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"hash {path.name}", disable=size < PROGRESS_BYTES) as bar,
    ):
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def check_hash(path: Path, sha256: str) -> None:
    """Raise UserError when the file's SHA-256 isn't `sha256`."""
    found = file_hash(path)
    if found != sha256.strip().lower():
        raise UserError(f"{path}: wrong sha256 {found}, expected {sha256}; the file is damaged or another version")


def write_tensors(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file tensor by tensor, sorted by name, atomically; equal tensors give equal bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    offset = 0
    for name in _order(tensors):
        lazy = tensors[name]
        header[name] = {
            "dtype": NAMES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [offset, offset + lazy.nbytes],
        }
        offset += lazy.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as stream,
        tqdm(total=offset, unit="B", unit_scale=True, desc=path.name, disable=offset < PROGRESS_BYTES) as bar,
    ):
        stream.write(struct.pack("<Q", len(text)) + text)
        for block in _blocks(tensors):
            stream.write(block)
            bar.update(len(block))


def _order(tensors: Mapping[str, Lazy]) -> list[str]:
    """Return the sort key: wide types first, as safetensors aligns them, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _blocks(tensors: Mapping[str, Lazy]) -> Iterator[memoryview]:
    for name in _order(tensors):
        lazy = tensors[name]
        tensor = lazy.load().detach().to("cpu", lazy.dtype).contiguous()
        if tuple(tensor.shape) != lazy.shape:
            raise ValueError(f"tensor '{name}' has shape {tuple(tensor.shape)}, announced was {lazy.shape}")
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def check_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Lazy], what: str) -> None:
    """Raise UserError with the missing, unexpected and misshaped names when `found` isn't exactly `expected`.

    what: the file and the model it should fit, the beginning of the message.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [
        f"{name} is {_shape(found[name].shape)} instead of {_shape(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
    parts = [f"{len(names)} {kind} ({some(names)})" for kind, names in groups if names]
    if parts:
        raise UserError(f"{what}: {', '.join(parts)}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def some(names: Sequence[str]) -> str:
    """Name the first ones, and how many more there are."""
    rest = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f", and {rest} more" if rest > 0 else "")


def fill(
    module: nn.Module,
    tensors: Mapping[str, Lazy],
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Load `tensors`, strictly and one at a time, into a module that was built on the meta device.

    dtype: type of floating tensors in the module (None: as stored). Raises UserError like `check_fit`.
    """
    state = module.state_dict()
    check_fit({name: tuple(value.shape) for name, value in state.items()}, tensors, what)
    for name in tqdm(state, desc=f"load {what}", disable=sum(t.nbytes for t in tensors.values()) < PROGRESS_BYTES):
        tensor = tensors[name].load()
        kind = dtype if dtype is not None and tensor.is_floating_point() else None
        # A copy: safe_open gives views of the mapped file, which must not be trained in place.
        tensor = tensor.to(device, kind, copy=True)
        parent = module.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if leaf in parent._parameters:
            old = parent._parameters[leaf]
            parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
        else:
            parent._buffers[leaf] = tensor
