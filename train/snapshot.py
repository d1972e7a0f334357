"""A checkpoint on disk: a folder that is whole, or known not to be.

    tensors.safetensors    every tensor
    state.json             everything else, with the tensors' names where they belong
    manifest.json          size and checksum of each file above, written last

Whatever else lies in such a folder when it is sealed (the shards of several processes, see `shards.py`) gets its
checksum as well. A checksum is the SHA-256 of the SHA-256s of the file's blocks of 16 MB, so that all cores share the
work.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lm_zoo.errors import UserError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 1
BLOCK_BYTES = 2**24
THREADS = 4
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_snapshot(state: dict[str, Any], folder: Path) -> None:
    """Writes `state`, a tree of dicts, lists, tuples, tensors, numbers, text and None, into an empty folder."""
    tree, tensors = flatten(state)
    write_tree(tree, folder, {TENSORS: write_summed(folder / TENSORS, _safetensors(tensors))})


def load_snapshot(folder: Path, *, tensors: bool = True) -> dict[str, Any]:
    """What `save_snapshot` wrote; with `tensors=False` at no cost, and with None for every tensor."""
    return load_tree(folder, load_file(folder / TENSORS) if tensors else None)


def flatten(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """`state` as JSON with names in place of tensors, and the tensors by their names."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple, str] = {}  # where a tensor's memory was met first: tied weights are written once
    return _to_json(state, "", tensors, names), tensors


def write_tree(tree: Any, folder: Path, sums: dict[str, dict]) -> None:
    """The JSON of `flatten`, and the manifest: the folder is then complete."""
    sums = {**sums, STATE: write_summed(folder / STATE, [json.dumps(tree).encode()])}
    seal(folder, sums)


def load_tree(folder: Path, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    """What was flattened, with these tensors in their places; with None for every tensor where none are given."""
    return _from_json(json.loads((folder / STATE).read_text(encoding="utf-8")), tensors)


def seal(folder: Path, sums: dict[str, dict] | None = None) -> None:
    """Writes the manifest: `sums` for the files it names, and freshly computed ones for all others."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sums = {name: (sums or {}).get(name) or checksum(folder / name) for name in files}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sums}, indent=1), encoding="utf-8")


def check_seal(folder: Path) -> None:
    """UserError unless every file is there and has the bytes it was written with."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no checkpoint: it is not a folder")
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is damaged: its {MANIFEST} cannot be read") from error
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise UserError(f"{folder} is damaged: {name} has {path.stat().st_size:,} bytes, not {size:,}")
        if checksum(path)["sha256"] != sha256:
            raise UserError(f"{folder} is damaged: {name} has not the checksum it was written with")


def checksum(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return _sum(iter(lambda: file.read(BLOCK_BYTES), b""))


def write_summed(path: Path, parts: Iterable[Any]) -> dict[str, int | str]:
    """Writes the parts one after another and returns their checksum, which is computed meanwhile."""
    with path.open("wb") as file:

        def written() -> Iterator[memoryview]:
            for part in parts:
                file.write(part)
                yield memoryview(part)

        return _sum(written())


def _sum(parts: Iterable[Any]) -> dict[str, int | str]:
    size, digests = 0, []
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future] = deque()
        for block in _blocks(parts):
            size += sum(map(len, block))
            waiting.append(pool.submit(_digest, block))
            if len(waiting) > 2 * THREADS:  # a file of any size in little memory
                digests.append(waiting.popleft().result())
        digests += [future.result() for future in waiting]
    return {"bytes": size, "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}


def _digest(block: list[Any]) -> bytes:
    sha256 = hashlib.sha256()
    for view in block:
        sha256.update(view)
    return sha256.digest()


def _blocks(parts: Iterable[Any]) -> Iterator[list[Any]]:
    """Blocks of BLOCK_BYTES, each as a list of views of the parts that it is made of."""
    block, room = [], BLOCK_BYTES
    for part in parts:
        view = memoryview(part)
        while len(view):
            block.append(view[:room])
            room -= len(block[-1])
            view = view[len(block[-1]) :]
            if room == 0:
                yield block
                block, room = [], BLOCK_BYTES
    yield block


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[Any]:
    """The bytes of a safetensors file, the largest element types first so that each is aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, start = {}, 0
    for name in names:
        end = start + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _to_json(value: Any, name: str, tensors: dict[str, Tensor], names: dict[tuple, str]) -> Any:
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is a tensor of {value.dtype}, which a checkpoint cannot hold")
        part = value.to_local() if isinstance(value, DTensor) else value
        memory = (part.device, part.data_ptr(), part.dtype, part.shape, part.stride())
        known = names.setdefault(memory, name) if part.numel() else name
        tensors[known] = value
        return {"$tensor": known}
    if isinstance(value, dict):
        inside = f"{name}/" if name else ""
        inner = [(key, _to_json(item, f"{inside}{key}", tensors, names)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(inner)
        return {"$items": [[_to_json(key, name, tensors, names), item] for key, item in inner]}
    if isinstance(value, list | tuple):
        inner = [_to_json(item, f"{name}/{i}", tensors, names) for i, item in enumerate(value)]
        return {"$tuple": inner} if isinstance(value, tuple) else inner
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers, text, lists and dicts")


def _from_json(tree: Any, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(tree, list):
        return [_from_json(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return None if tensors is None else tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(_from_json(item, tensors) for item in tree["$tuple"])
    if "$items" in tree:
        return {_from_json(key, tensors): _from_json(item, tensors) for key, item in tree["$items"]}
    return {key: _from_json(item, tensors) for key, item in tree.items()}
