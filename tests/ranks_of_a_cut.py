"""What the ranks of `train/test_tensor_parallel.py` do: `ranks_of_a_cut.py OUT rows|sequence TENSOR`, by torchrun.

A model with every mixer, cut over TENSOR ranks and sharded over the others, which have a row each or share one, against
the same model in one process: parameters, loss, gradients, logits with a cache, and what is told of its layers. The
differences go into OUT, as JSON.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from compare import relative_error
from forked_ranks import as_by_torchrun
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lm_zoo.config import ZooConfig
from lm_zoo.eval.flops import flops_per_token
from lm_zoo.eval.layer_statistics import layer_statistics
from lm_zoo.kernels.sequence_parallel import sequence_parallel
from lm_zoo.model import ZooForCausalLM
from lm_zoo.train.sharded_init import sharded_model
from lm_zoo.train.tensor_parallel import cut_model

FOUR = {"num_heads": 4}
MIXERS = {
    "retnet": FOUR,
    "gla": {**FOUR, "gate_rank": 4},
    "linear_attention": {**FOUR, "feature_map": "t2r"},
    "linear_attention, normed": {"type": "linear_attention", **FOUR, "feature_map": "hedgehog", "denominator": False},
    "lightning": {**FOUR, "lrpe": True},
    "lightning, sigmoid": {"type": "lightning", **FOUR, "gate": "sigmoid"},
    "hgrn": {},
    "hgrn, complex": {"type": "hgrn", "complex": True},
    "hgrn2": FOUR,
    "lightnet": {**FOUR, "gate_rank": 4},
    "deltanet": {**FOUR, "use_gate": True, "expand_v": 2.0},
    "gated_deltanet": {**FOUR, "num_value_heads": 8, "expand_k": 0.5},
    "deltaproduct": {**FOUR, "gated": True},
    "kda": FOUR,
    "mamba": {"state_size": 4},
    "mamba2": {"head_size": 8, "state_size": 4, "num_groups": 4, "allow_negative_eigenvalues": True},
    "mamba2, one group": {"type": "mamba2", "head_size": 8, "state_size": 4},
    "s4d": {"state_size": 4},
    "attention": {**FOUR, "num_kv_heads": 4},
    "attention, grouped": {"type": "attention", "num_heads": 8, "num_kv_heads": 4, "window": 3},
}
T = 12


def new_config() -> ZooConfig:
    return ZooConfig(vocab_size=16, hidden_size=32, num_hidden_layers=len(MIXERS), intermediate_size=24, mixers=MIXERS)


def texts(count: int) -> Tensor:
    return torch.randint(16, (count, T), generator=torch.Generator().manual_seed(1))


def difference_of_layers(model: ZooForCausalLM, whole: ZooForCausalLM, ids: Tensor, mesh: DeviceMesh) -> float:
    def gather(x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, [Shard(0)]).full_tensor()

    largest = 0.0
    for layer, right in zip(layer_statistics(model, ids, gather=gather), layer_statistics(whole, ids), strict=True):
        for name in ("mean_decay", "memory_length", "state_norm"):
            if layer[name] != right[name]:  # also where both are inf
                largest = max(largest, abs(layer[name] / right[name] - 1))
    return largest


def main(out: Path, shared: str, tensor: int) -> None:
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    data = dist.get_world_size() // tensor
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))

    def shard(model: ZooForCausalLM) -> None:
        cut_model(model, mesh["tensor"])
        for block in model.model.layers:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])

    torch.manual_seed(0)
    model = sharded_model(new_config(), shard, torch.device("cpu"))
    torch.manual_seed(0)
    whole = ZooForCausalLM(new_config())
    held = sum(part.to_local().numel() for part in model.parameters()) / whole.num_parameters()
    ids = texts(data if shared == "rows" else 1)
    if shared == "rows":
        own = ids.chunk(data)[mesh.get_coordinate()[0]]
        loss = model(own, labels=own, z_loss=0.01).loss
        loss.backward()
    else:
        with sequence_parallel(mesh["data"], form="ring") as group:
            own = group.segment(ids)
            loss = model(own, labels=own, z_loss=0.01).loss
            (data * loss).backward()
    expected = whole(ids, labels=ids, z_loss=0.01).loss
    expected.backward()
    dist.all_reduce(loss := loss.detach(), group=mesh["data"].get_group())
    found = {"loss": relative_error(loss / data, expected), "parameters": 0.0, "gradients": {}, "held": held}
    for (name, part), right in zip(model.named_parameters(), whole.parameters(), strict=True):
        found["parameters"] += float(not torch.equal(part.full_tensor(), right))
        found["gradients"][name] = relative_error(part.grad.full_tensor(), right.grad)
    with torch.no_grad():
        cache, right_cache = model.init_cache(1), whole.init_cache(1)
        for piece in (slice(0, T - 1), slice(T - 1, T)):  # in chunks, then by a step
            logits = model(ids[:1, piece], past_key_values=cache).logits
            right = whole(ids[:1, piece], past_key_values=right_cache).logits
            found[f"logits {piece.start}"] = relative_error(logits, right)
    found["layers"] = difference_of_layers(model, whole, ids[:1], mesh["tensor"])
    found["flops"] = flops_per_token(model, T) / flops_per_token(whole, T) - 1
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    as_by_torchrun(lambda: main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
