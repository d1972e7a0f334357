"""What ranks check besides numbers: what is said of bad input, the bytes that are received, and the order of things."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lm_zoo.kernels import causal_conv1d, linear_attention, linear_scan
from lm_zoo.kernels.sequence_parallel import SequenceGroup, sequence_parallel
from lm_zoo.kernels.sequence_parallel.recurrences import linear_attention_segment
from lm_zoo.kernels.sequence_parallel.volume import Messages, received
from lm_zoo.layers.kv_state import softmax_attention

sys.path.append(str(Path(__file__).parents[1]))  # at the end, as it has a folder named lm_zoo

T, BATCH = 24, 2


def small_models():
    """The module of small layers and models that the tests of lm_zoo share."""
    path = Path(__file__).parents[1] / "lm_zoo" / "conftest.py"
    spec = importlib.util.spec_from_file_location("small_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- bad input ----------------------------------------------------------------------------------------------------


def message_of(act: Callable[[], object]) -> str:
    try:
        act()
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was raised"


def refusals(group: SequenceGroup) -> dict[str, str]:
    """What is said of bad input: by every rank, before anything is sent that another would wait for."""
    x = torch.ones(1, 6 + group.rank, 2)
    one = torch.ones(1, 2, dtype=torch.float64)
    layer = small_models().make_layer("gla")
    return {
        "lengths": message_of(lambda: linear_scan(x, x / 2)),
        "divide": message_of(lambda: group.segment(torch.ones(1, 21))),
        "form": message_of(lambda: sequence_parallel(dist.group.WORLD, "ulysses").__enter__()),
        "group": message_of(lambda: sequence_parallel("sequence").__enter__()),
        "mesh": message_of(lambda: sequence_parallel(two_dimensions()).__enter__()),
        "step": message_of(lambda: torch.no_grad()(layer)(torch.ones(1, 1, 32).double(), state=layer.init_state(1))),
        "cache": message_of(lambda: padded_with_cache(group)),
        "linearized": message_of(linearized),
        "reverse": message_of(lambda: linear_scan(one[None], one[None], reverse=True)),
        "bounds": message_of(lambda: linear_scan(one[None], one[None], cu_seqlens=torch.tensor([0, 1]))),
    }


def padded_with_cache(group: SequenceGroup):
    model, ids = small_models().make_model("gla"), torch.ones(1, 6, dtype=torch.int64)
    model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), past_key_values=model.init_cache(1))


def linearized():
    from tiny_teachers import new_teacher

    from lm_zoo.linearized import LinearizedForCausalLM

    LinearizedForCausalLM.from_teacher(new_teacher("llama"), "hybrid", {})(torch.ones(1, 6, dtype=torch.int64))


def two_dimensions():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "sequence"))


# ---- volumes ------------------------------------------------------------------------------------------------------


def volumes(group: SequenceGroup) -> dict[str, list[int]]:
    """For every kind of message: bytes that were received by the busiest rank, and those that `received` counts."""
    K, V, heads, width, window = 6, 5, 4, 4, 3
    state = BATCH * heads * K * V * 8
    cases = {
        "constant": ("q k v constant", Messages(state=state, transition=BATCH * heads * 8)),
        "channel": ("q k v channel", Messages(state=state, transition=BATCH * heads * K * 8)),
        "delta": ("q k v beta", Messages(state=state, transition=BATCH * heads * K * K * 8)),
        "convolution": (None, Messages(tail=BATCH * (width - 1) * 7 * 8)),
        "window": (window, Messages(tail=BATCH * window * 2 * heads * K * 8)),
        "attention": (None, Messages(keys=BATCH * 2 * heads * K * 8)),
    }
    x = {name: torch.rand(BATCH, T, heads, K, dtype=torch.float64) for name in ("q", "k", "channel")}
    x |= {"v": torch.rand(BATCH, T, heads, V, dtype=torch.float64), "beta": torch.rand(BATCH, T, heads).double()}
    x = {name: group.segment(tensor).requires_grad_() for name, tensor in x.items()}
    found = {}
    for name, (options, messages) in cases.items():
        before = group.received
        if name == "convolution":
            y = causal_conv1d(torch.ones(BATCH, T // group.size, 7).double().requires_grad_(), torch.ones(7, width))
        elif name in ("window", "attention"):
            q, k, v = (x[n].transpose(1, 2) for n in ("q", "k", "channel"))
            y = softmax_attention(q, k, v, window=options)
        else:
            decay = {"constant": -torch.ones(heads).double(), "channel": -x["channel"]}.get(name)
            y = linear_attention(x["q"], x["k"], x["v"], decay, x["beta"] if name == "delta" else None)[0]
        y.sum().backward()
        busiest = torch.tensor(group.received - before)
        dist.all_reduce(busiest, dist.ReduceOp.MAX)
        found[name] = [busiest.item(), received(group.form, group.size, T, messages)]
    return found


# ---- overlap ------------------------------------------------------------------------------------------------------


class _Log(torch.autograd.Function):
    """x itself; says when its gradient is there."""

    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        ctx.events.append("computed")
        return dx, None


class _LoggedWork:
    def __init__(self, work: dist.Work, events: list[str]):
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("waited")
        self.work.wait()


def order(group: SequenceGroup) -> dict[str, list[str]]:
    """When a gathered state is sent, the segment itself computed, and the other states waited for."""
    found = {}
    with sequence_parallel(group.group, "all_gather") as logged:
        gather, events = logged.gather, []

        def logging_gather(x: Tensor):
            events.append("sent")
            rows, work = gather(x)
            return rows, _LoggedWork(work, events)

        def logging_op(q: Tensor, *arguments, **options):
            found = linear_attention(_Log.apply(q, events), *arguments, **options)
            events.append("computed")
            return found

        logged.gather = logging_gather
        q, k, v = (torch.rand(1, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
        states = {"initial_state": None, "output_final_state": False, "cu_seqlens": None}
        arguments = (logged, q, k, v, -torch.ones(2).double(), None)
        o, _ = linear_attention_segment(logging_op, *arguments, scale=1.0, backend="torch", **states)
        found["forward"] = list(events)
        events.clear()
        o.sum().backward()
        found["backward"] = list(events)
    return found
