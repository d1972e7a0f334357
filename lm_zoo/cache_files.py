"""States on disk: the tensors of a cache in a safetensors file that names the model it belongs to.

"{layer}.{tensor}"     the states, one row per text; complex numbers as pairs of real ones
"unread"               token ids [B, n] that go with the states and that the model has not read yet, if any
metadata               format, version, length, and the hash of the model: see `model_hash`
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm_zoo.errors import UserError
from lm_zoo.files import whole_file

if TYPE_CHECKING:
    from lm_zoo.cache import ZooCache
    from lm_zoo.causal_lm import CausalLM

FORMAT, VERSION = "lm_zoo cache", "1"
NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # of a config


def model_hash(model: CausalLM) -> str:
    """SHA-256 over the configuration and the weights: name, dtype, shape and bytes of each.

    Where the folder lies and which version of transformers wrote it do not count. The dtype does: states that were
    computed in another precision are other states.
    """
    found = hashlib.sha256(json.dumps(_without_names(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_cache(path: str | Path, cache: ZooCache, model_id: str, unread: Tensor | None = None) -> None:
    """Write the cache of the model with that hash, under a temporary name until all of it is there."""
    tensors = {} if unread is None else {"unread": unread.detach().cpu().contiguous()}
    for layer, state in enumerate(cache.states):
        for name, tensor in state.trim().tensors.items():
            tensor = tensor.detach().cpu()
            tensors[f"{layer}.{name}"] = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()
    about = {"format": FORMAT, "version": VERSION, "model": model_id, "length": str(cache.length)}
    with whole_file(Path(path)) as unfinished:
        save_file(tensors, unfinished, metadata=about)


def load_cache(path: str | Path, model: CausalLM, model_id: str | None = None) -> tuple[ZooCache, Tensor | None]:
    """The cache in a file, on the model's device, and the tokens that were saved with it.

    `model_id` is the hash of the model, if it is known already. Raises UserError for a file of another model, a
    truncated one and one that is no cache; OSError where there is none.
    """
    path = Path(path)
    with path.open("rb"):  # for the operating system's own words on a file that cannot be read
        pass
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise UserError(f"{path} is no state file, or cut short ({error}); save the state again") from error
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise UserError(f"{path} is no state file of this version of lm_zoo; save the state again")
    if about["model"] != (model_hash(model) if model_id is None else model_id):
        raise UserError(
            f"{path} holds the state of another model: its weights, configuration or dtype differ; "
            "load the model that wrote it, or name another file"
        )
    unread = tensors.pop("unread", None)
    cache = model.init_cache(1)
    cache.length = int(about["length"])
    expected = {f"{layer}.{name}" for layer, state in enumerate(cache.states) for name in state}
    if tensors.keys() != expected:
        raise UserError(f"{path} lacks tensors of the state, or has others; save the state again")
    for layer, state in enumerate(cache.states):
        found = {}
        for name, tensor in state.tensors.items():  # copied: what safetensors hands out is the file itself in memory
            read = tensors[f"{layer}.{name}"].to(tensor.device, copy=True)
            found[name] = torch.view_as_complex(read) if tensor.is_complex() else read
        cache.states[layer] = state.holding(found)
    return cache, None if unread is None else unread.to(model.device)


def _without_names(config: Any) -> Any:
    """The configuration, and those inside it, without what may differ between copies of one model."""
    if isinstance(config, dict):
        return {str(key): _without_names(value) for key, value in config.items() if key not in NOT_THE_MODEL}
    return [_without_names(value) for value in config] if isinstance(config, list | tuple) else config
