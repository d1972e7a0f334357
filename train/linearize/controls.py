"""What is measured of every linearization, on text that it was not trained on."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.eval.generation import generate
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.linearized.inner import Context
from lm_zoo.linearized.interface import softmax
from lm_zoo.train.linearize.data import PackedRows
from lm_zoo.train.linearize.weights import in_window

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, Context], Tensor]
ROWS = 4  # of the text, in a forward pass
PROMPT_TOKENS, CONTINUATION_TOKENS = 32, 96


@torch.no_grad()
def perplexity(
    student: LinearizedForCausalLM, rows: PackedRows, max_tokens: int, observer: Observer | None = None
) -> float:
    """exp of the mean negative log-likelihood of the tokens that have one before them in their text.

    With the observer `softmax` it is the teacher's.
    """
    total, count = 0.0, 0
    for batch in rows.batches(ROWS, max_tokens):
        batch = batch.to(student.device)
        index, targets = batch.next_tokens()
        with contextlib.nullcontext() if observer is None else student.observed(observer):
            hidden = student.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)
        total += student.head_loss(hidden[0, index], targets, reduction="none").double().sum().item()
        count += len(targets)
    return math.exp(min(total / count, 709.0))  # the largest float instead of an overflow


def window_only(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """The observer for "window only": each replaced layer's softmax over its mixer's window, and nothing beyond.

    Without a window nothing is left, and the layer's attention adds nothing to its input.
    """
    if module.mixer is None:
        return softmax(module, q, k, v, context)
    window, kind = window_of(module.mixer)
    if window == 0:
        return torch.zeros_like(q)
    bounds = [0, q.shape[1]] if context.cu_seqlens is None else context.cu_seqlens.tolist()
    outputs = []
    for start, end in itertools.pairwise(bounds):
        token = torch.arange(end - start, device=q.device)
        distance = token[:, None] - token
        seen = (distance >= 0) & in_window(distance, window, kind)
        if module.softmax_window is not None:  # the teacher looks no further either
            seen = seen & (distance < module.softmax_window)
        text = (x[:, start:end].transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[2] > k.shape[2]
        o = F.scaled_dot_product_attention(*text, attn_mask=seen, scale=module.scaling, enable_gqa=grouped)
        outputs.append(o.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def window_of(mixer: nn.Module) -> tuple[int, str]:
    """Size and kind of the window in which the mixer keeps softmax; 0 where it has none."""
    return getattr(mixer, "window", 0), getattr(mixer, "window_kind", "sliding")


def has_window(student: LinearizedForCausalLM) -> bool:
    return any(window_of(module.mixer)[0] > 0 for module in replaced_layers(student))


def replaced_layers(student: LinearizedForCausalLM) -> list[nn.Module]:
    """The attention modules that a mixer works in."""
    return [module for module in student.attention_layers if module.mixer is not None]


def gap_closed(window_only: float | None, teacher: float, student: float) -> float | None:
    """Share of the perplexity between the window-only control and the teacher that the student has won back.

    `None` without a window, or where the window alone is as good as the teacher.
    """
    if window_only is None or window_only <= teacher:
        return None
    return (window_only - student) / (window_only - teacher)


def state_size(student: LinearizedForCausalLM) -> dict[str, float | int | None]:
    """Bytes that the replaced layers remember of a text, and from what length on a KV cache holds more."""
    cache = student.init_cache(1)
    layers = replaced_layers(student)
    state = sum(cache.states[module.layer_idx].nbytes for module in layers)
    element = torch.finfo(student.dtype).bits // 8
    per_token = sum(2 * module.mixer.num_kv_heads * module.mixer.head_size * element for module in layers)
    return {
        "bytes": state,
        "kv_cache_bytes_per_token": per_token,
        "smaller_than_the_kv_cache_from": state // per_token + 1 if per_token else None,
    }


def prompt_from(rows: PackedRows, tokenizer) -> str:
    """The first words of a held-out text, where no prompt is given."""
    return tokenizer.decode(rows.texts[0][:PROMPT_TOKENS], skip_special_tokens=True)


def continuation(model: nn.Module, tokenizer, prompt: str, tokens: int = CONTINUATION_TOKENS) -> str:
    """What a model makes of the prompt, always taking the likeliest token."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    taken = len(tokenizer(prompt)["input_ids"])
    tokens = int(min(tokens, room - taken))
    return generate(model, tokenizer, prompt, temperature=0, max_tokens=tokens) if tokens > 0 else prompt
