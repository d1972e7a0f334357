"""Runs one pass of linear attention in PyTorch (float64) and in Triton on the same inputs, and compares.

Values are kept by the names that the passes give them, in Triton's layout (`[B, T, H, D]`, states `[M, HV, K, V]`) and
in float64; a pass finds its arguments among them by name. Both sides see them rounded to the dtype that the Triton
side keeps them in.
"""

import inspect

import torch
from compare import assert_close
from torch import Tensor

from lm_zoo.kernels.linear_attention import torch_passes, triton_passes
from lm_zoo.kernels.linear_attention.chunks import CHUNK_LENGTH

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECAYS = ("none", "scalar", "channel")

# What each pass returns, then what it writes to in place; in the order in which the delta rule runs them.
RESULTS = {
    "chunk_scores": (("A_qk", "A_kk"), ()),
    "delta_transform": (("T",), ()),
    "delta_apply": (("u", "w"), ()),
    "chunk_states": (("states", "v_new"), ("state",)),
    "chunk_output": (("o",), ()),
    "chunk_output_backward": (("dv_new",), ()),
    "chunk_states_backward": (("dstates",), ("dv_new", "dstate")),
    "chunk_gradients": (("dq", "dk", "dw", "dG", "dlog_decay", "dA_qk"), ()),
    "delta_transform_backward": (("dA_kk", "dv", "dbeta"), ("dk", "dG")),
    "chunk_scores_backward": ((), ("dq", "dk", "dG")),
}
DELTA_ONLY = ("delta_transform", "delta_apply", "delta_transform_backward")
# Gates, sums and states; all else is in the dtype of q.
FLOAT32 = ("G", "state", "dstate", "dq", "dk", "dG", "dlog_decay", "dA_qk", "dA_kk")


def chunk_numbers(cu_seqlens: Tensor | None, B: int, T: int) -> Tensor:
    """`[B, T, 1]`, the chunk of each token as Triton counts: one sequence after the other."""
    lengths = [T] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    numbers, first = [], 0
    for length in lengths:
        numbers.append(first + torch.arange(length) // CHUNK_LENGTH)
        first += -(-length // CHUNK_LENGTH)
    return torch.cat(numbers).view(B, T, 1).double().to(DEVICE)


def make_inputs(
    decay: str,
    delta: bool,
    *,
    T: int,
    B: int = 1,
    H: int = 1,
    HV: int = 2,
    K: int = 16,
    V: int = 24,
    lowest: float = -1.0,
    resets: float = 0.0,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Arguments of `linear_attention` in float64, exact in `dtype`, the decays and the states in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator).to(DEVICE)

    rows = B if cu_seqlens is None else len(cu_seqlens) - 1
    gates = {"none": None, "constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)}[decay]
    log_decay = None if gates is None else lowest * uniform(*gates)
    if log_decay is not None and resets:
        log_decay[uniform(*gates) < resets] = -torch.inf
    inputs = {
        "q": draw(B, T, H, K).to(dtype),
        "k": torch.nn.functional.normalize(draw(B, T, H, K), dim=-1).to(dtype),
        "v": draw(B, T, HV, V).to(dtype),
        "log_decay": log_decay,
        "beta": 2 * uniform(B, T, HV).to(dtype) if delta else None,
        "initial_state": draw(rows, HV, K, V),
    }
    return {name: None if x is None else x.double() for name, x in inputs.items()}


class Twins:
    """One call of the op, as both sets of passes see it: `values` holds the inputs, then what was computed of them.

    The options are those of `make_inputs`.
    """

    def __init__(
        self,
        decay: str,
        delta: bool,
        *,
        cu_seqlens: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        decay_gradient: bool = True,
        **options,
    ) -> None:
        self.values = make_inputs(decay, delta, cu_seqlens=cu_seqlens, dtype=dtype, **options)
        q, v, state, log_decay = (self.values[name] for name in ("q", "v", "initial_state", "log_decay"))
        B, T, self.heads = v.shape[:3]
        self.dtype, self.delta, self.decay = dtype, delta, decay
        generator = torch.Generator().manual_seed(1)
        self.values |= {
            "state": state,
            "do": torch.randn(v.shape, generator=generator).to(q),
            "dstate": torch.randn(state.shape, generator=generator).to(q),
            "u": v,  # what the additive update writes
            **dict.fromkeys(("w", "G", "A_kk", "dA_kk", "dv_new", "dstates")),
        }
        self.options = {"scale": 0.3, "delta": delta, "decay_gradient": log_decay is not None and decay_gradient}
        self.segment = triton_passes.cut(q.to(dtype), v.to(dtype), cu_seqlens)
        self.chunks = torch_passes.cut(q, v, cu_seqlens)
        (self.torch_segment,) = self.chunks.segments
        # The Triton number of each torch chunk: those go by time, Triton's by sequence.
        self.order = self.torch_segment.split(chunk_numbers(cu_seqlens, B, T), 1)[:, 0, 0].long()
        if log_decay is not None:
            self.values["G"] = triton_passes.cumulative_decay(log_decay.float(), self.segment).double()

    def rounded(self, name: str) -> Tensor | None:
        """As Triton keeps it, in float64."""
        x = self.values[name]
        return None if x is None else x.to(self.dtype_of(name)).double()

    def dtype_of(self, name: str) -> torch.dtype:
        unsaved_scores = name == "A_kk" and self.decay != "channel"
        return torch.float32 if name in FLOAT32 or unsaved_scores else self.dtype

    # ---- both sides ----

    def torch_pass(self, name: str) -> dict[str, Tensor]:
        """What the pass returns and writes, in float64, in Triton's layout."""
        arguments = {key: self._to_torch(key, self.rounded(key)) for key in self._arguments(name)}
        return self._call(torch_passes, name, arguments, self.torch_segment, self._from_torch)

    def triton_pass(self, name: str, absent: tuple[str, ...] = (), **replaced: Tensor) -> dict[str, Tensor]:
        """What the pass returns and writes. `absent` are the arguments that it is given as `None`, because it computes
        them itself; `replaced` those to be given in another dtype, say."""
        arguments = {}
        for key in self._arguments(name):
            x = None if key in absent else self.values[key]
            arguments[key] = None if x is None else x.to(self.dtype_of(key), copy=True).contiguous()
        arguments |= replaced
        signatures = (inspect.signature(getattr(passes, name)).parameters for passes in (torch_passes, triton_passes))
        assert len({tuple(names) for names in signatures}) == 1, f"{name} takes other arguments in Triton"
        return self._call(triton_passes, name, arguments, self.segment, lambda key, x: x)

    def advance(self, name: str) -> dict[str, Tensor]:
        """Runs the torch pass and keeps what it found among the values."""
        found = self.torch_pass(name)
        self.values.update(found)
        self.values["du"] = self.values["dv_new"]
        return found

    def advance_to(self, name: str) -> None:
        """Runs all torch passes before this one."""
        names = list(RESULTS)
        if not self.delta:
            names = [name for name in names if name not in DELTA_ONLY]
            names.remove("chunk_states_backward")
            names.insert(names.index("chunk_output_backward"), "chunk_states_backward")
        for before in names[: names.index(name)]:
            state = self.values["state"]
            self.advance(before)
            self.values["state"] = state  # the initial one, as the recomputing backward pass finds it

    def found(self, name: str) -> dict[str, Tensor]:
        """What the Triton pass returns and writes, without the scores that it forms itself."""
        scores = () if self.decay == "channel" else ("A_qk", "A_kk") if name.endswith("_backward") else ("A_qk",)
        found = self.triton_pass(name, scores)
        if name == "chunk_scores" and self.delta:  # without decay, what the value heads of a group share
            found["A_kk"] = found["A_kk"].repeat_interleave(self.heads // found["A_kk"].shape[2], dim=2)
        return found

    def expected(self, name: str) -> dict[str, Tensor]:
        """The same of the torch pass, and what the scores' backward pass adds to it where Triton does both in one."""
        found = self.torch_pass(name)
        if self.decay != "channel" and name in ("chunk_gradients", "delta_transform_backward"):
            before, self.values = self.values, self.values | found
            if name == "delta_transform_backward":  # which has only the part of A_kk
                self.values["dA_qk"] = torch.zeros_like(before["dA_qk"])
            found |= self.torch_pass("chunk_scores_backward")
            self.values = before
        return found

    def compare(self, name: str, tolerance: float, absent: tuple[str, ...] = (), **replaced: Tensor) -> None:
        """The Triton pass against the torch pass, in all that both return and write."""
        expected = self.torch_pass(name)
        actual = self.triton_pass(name, absent, **replaced)
        for key, x in actual.items():
            if x is None:
                continue
            if key in ("states", "dstates"):  # with packed sequences, some chunks do not exist
                x, expected[key] = x[self.order], expected[key][self.order]
            if key == "A_kk":  # without decay, what the value heads of a group share
                x = x.repeat_interleave(self.heads // x.shape[2], dim=2)
            assert_close(x, expected[key], tolerance, f"{name}: {key}")

    # ---- layouts ----

    def _arguments(self, name: str) -> list[str]:
        names = inspect.signature(getattr(torch_passes, name)).parameters
        return [key for key in names if key not in ("segment", *self.options)]

    def _call(self, passes, name, arguments, segment, convert) -> dict[str, Tensor]:
        function = getattr(passes, name)
        options = {k: v for k, v in self.options.items() if k in inspect.signature(function).parameters}
        returned = function(**arguments, **options, segment=segment)
        returned = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        results, written = RESULTS[name]
        found = dict(zip(results, returned, strict=True)) | {key: arguments[key] for key in written}
        return {key: None if x is None else convert(key, x) for key, x in found.items()}

    def _to_torch(self, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if name in ("state", "dstate"):
            return self.chunks.sort_states(x)
        if name in ("states", "dstates"):
            return x[self.order]
        x = self.torch_segment.split(x, self.heads)
        return x.cummin(2)[0] if name == "G" else x  # padding keeps the last G, which falls; other values are 0 there

    def _from_torch(self, name: str, x: Tensor) -> Tensor:
        if name in ("state", "dstate"):
            return self.chunks.unsort_states(x)
        if name in ("states", "dstates"):
            out = x.new_zeros(self.segment.chunks, *x.shape[1:])
            out[self.order] = x
            return out
        return self.torch_segment.join(x.contiguous(), None, self.heads, torch.float64)
