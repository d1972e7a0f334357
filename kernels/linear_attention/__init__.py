"""Linear attention with a matrix-valued state: one op for every decay and update of the zoo.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

`reference.py` is this recurrence and nothing more. `chunkwise.py` computes it in parallel over chunks of 64 tokens,
forward and backward, from the passes in `torch_passes.py` or `triton_passes/`. `step.py` is one token at a time, for
decoding.
"""

import torch
from torch import Tensor

from lm_zoo.kernels.backends import choose
from lm_zoo.kernels.checks import (
    check_cu_seqlens,
    check_same,
    check_shape,
    check_tensor,
    check_values,
)
from lm_zoo.kernels.linear_attention.chunkwise import linear_attention_chunkwise
from lm_zoo.kernels.linear_attention.reference import linear_attention_reference
from lm_zoo.kernels.linear_attention.step import linear_attention_step
from lm_zoo.kernels.sequence_parallel.group import active_group
from lm_zoo.kernels.sequence_parallel.recurrences import linear_attention_segment

__all__ = ["linear_attention", "linear_attention_step"]

LARGEST_HEAD = 256  # of the Triton kernels, which hold a whole key in one tile


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""Linear attention with optional decay and delta rule.

        S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

    and without `beta`, S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T. With no decay this is linear attention (Katharopoulos
    et al. 2020), with a constant decay RetNet (Sun et al. 2023), with a scalar one per token Mamba-2 (Dao and Gu 2024),
    with one per key channel GLA (Yang et al. 2023); with `beta` DeltaNet (Yang et al. 2024), Gated DeltaNet (Yang et
    al. 2024) and KDA (Kimi Team 2025). Computed in chunks of 64 tokens, so time and memory are linear in T.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, HV a multiple of H: each q and k head serves HV / H value heads.
        log_decay: g, the natural logarithm of the decay, <= 0; -inf forgets everything. `None`, `[HV]` (constant),
            `[B, T, HV]` (per token) or `[B, T, HV, K]` (per token and key channel).
        beta: write strength of the delta rule in [0, 2], `[B, T, HV]`; `None` is the additive update. The recurrence
            only stays bounded where `beta |k|^2 <= 2`, so normalise k.
        scale: factor on the output, `K ** -0.5` if not given.
        initial_state: `[B, HV, K, V]`, or `[N, HV, K, V]` with `cu_seqlens`; zero if not given.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` int32 or int64, borders of N sequences packed along time, from 0 to T; needs B = 1.
        backend: "auto", "triton" (chunkwise, on a GPU), "torch" (chunkwise, any device) or "reference" (token by token,
            slow). "auto" takes Triton on a GPU where it works, else PyTorch; see `backends.py`.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state (float32, or float64 for float64 inputs) or `None`.

    Raises:
        TypeError: an argument that is not a floating tensor. ValueError: a shape, device, dtype or option that does not
        fit, a `cu_seqlens` that does not run from 0 to T, and on a CPU a log_decay above 0, a beta outside [0, 2] or a
        state that is not finite; the message names the argument.
    """
    _check_arguments(q, k, v, log_decay, beta, initial_state, cu_seqlens)
    if (group := active_group()) is not None:
        options = {"scale": scale, "initial_state": initial_state, "output_final_state": output_final_state}
        options |= {"cu_seqlens": cu_seqlens, "backend": backend}
        return linear_attention_segment(linear_attention, group, q, k, v, log_decay, beta, **options)
    backend = choose(backend, q, unsupported=_not_in_triton(q, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*v.shape[:2], -1)
    arguments = (q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):  # it would round states and scores to its dtype
        if backend == "reference":
            o, final_state = linear_attention_reference(*arguments)
        else:
            o, final_state = linear_attention_chunkwise(*arguments, backend=backend)
    return o.to(v.dtype), final_state if output_final_state else None


def _not_in_triton(q: Tensor, v: Tensor) -> str | None:
    if (size := max(q.shape[-1], v.shape[-1])) > LARGEST_HEAD:
        return f"its tiles hold heads of at most {LARGEST_HEAD} channels, got {size}"
    return None


def _check_arguments(q, k, v, log_decay, beta, initial_state, cu_seqlens) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    check_shape("q", q, "[B, T, H, K]", (-1, -1, -1, -1))
    batch, length, heads, key_size = q.shape
    check_shape("k", k, "[B, T, H, K]", (batch, length, heads, key_size))
    check_shape("v", v, "[B, T, HV, V]", (batch, length, -1, -1))
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    value_heads, value_size = v.shape[2:]
    if length == 0:
        raise ValueError("q must have at least one token, got T = 0")
    if heads == 0 or value_heads % heads:
        raise ValueError(f"v must have a multiple of the {heads} heads of q and k, got HV = {value_heads}")
    if log_decay is not None:
        check_tensor("log_decay", log_decay)
        check_same("log_decay", log_decay, "q", q, dtype=False)
        shapes = {
            1: ("[HV]", (value_heads,)),
            3: ("[B, T, HV]", (batch, length, value_heads)),
            4: ("[B, T, HV, K]", (batch, length, value_heads, key_size)),
        }
        if log_decay.dim() not in shapes:
            raise ValueError(
                f"log_decay must be [HV], [B, T, HV] or [B, T, HV, K], got {log_decay.dim()} dimensions: "
                f"{list(log_decay.shape)}"
            )
        check_shape("log_decay", log_decay, *shapes[log_decay.dim()])
        check_values("log_decay", log_decay, "<= 0, a logarithm of a decay of at most 1", lambda x: x <= 0)
    if beta is not None:
        check_tensor("beta", beta)
        check_same("beta", beta, "q", q, dtype=False)
        check_shape("beta", beta, "[B, T, HV]", (batch, length, value_heads))
        check_values("beta", beta, "in [0, 2]", lambda x: (x >= 0) & (x <= 2))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, q.device)
    if initial_state is not None:
        check_tensor("initial_state", initial_state)
        check_same("initial_state", initial_state, "q", q, dtype=False)
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        layout = "[B, HV, K, V]" if cu_seqlens is None else "[N, HV, K, V]"
        check_shape("initial_state", initial_state, layout, (rows, value_heads, key_size, value_size))
        check_values("initial_state", initial_state, "finite", torch.isfinite)
