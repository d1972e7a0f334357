"""The equations of the registered mixers between a teacher's projections, token by token: what their tests expect."""

import torch
import torch.nn.functional as F
from layer_oracles import rms_norm


def expected_registered(mixer, texts):
    """s * mix(q, k, v, x), with q and k turned or not, k and v repeated for the query heads."""
    q, k = (texts.q, texts.k) if mixer.rotary else (texts.plain_q, texts.plain_k)
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, texts.v))
    y = EQUATIONS[type(mixer.layer).__name__](mixer.layer, q, k, v, texts.hidden)
    return y.view(q.shape) * mixer.output_scale


def recurrence(q, k, v, decay, beta=None):
    """S_t = Diag(a_t) S_{t-1} + k_t v_t^T, or b_t k_t (v_t - (Diag(a_t) S_{t-1})^T k_t)^T added; o_t = S_t^T q_t."""
    S, outputs = torch.zeros(len(q), q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = decay[:, t, ..., None] * S
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None] * (write - (S * k[:, t, ..., None]).sum(2))
        S = S + k[:, t, ..., None] * write[:, :, None]
        outputs.append((S * q[:, t, ..., None]).sum(2))
    return torch.stack(outputs, dim=1)


def convolved(conv, *heads):
    """Each of `[B, T, H, D]`, their channels side by side in the weights."""
    x, size = torch.cat([y.flatten(2) for y in heads], dim=-1), conv.weight.shape[1]
    y = sum(conv.weight[:, w] * F.pad(x, (0, 0, size - 1 - w, 0))[:, : x.shape[1]] for w in range(size))
    y = y if conv.bias is None else y + conv.bias
    y = y * torch.sigmoid(y) if conv.silu else y
    return [part.view_as(head) for part, head in zip(y.chunk(len(heads), dim=-1), heads, strict=True)]


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def per_head(projection, x, like):
    return projection(x).view(like.shape)


def softplus_rate(decay, x):
    """exp(A_log) softplus(x + dt_bias), and the softplus."""
    dt = F.softplus(x + decay.dt_bias)
    rate = decay.A_log.exp()
    return dt * (rate if x.dim() == 3 else rate[:, None]), dt


def silu_gated(layer, o, x):
    gate = per_head(layer.gate_proj, x, o)
    return rms_norm(o, layer.norm.weight) * gate * torch.sigmoid(gate)


def delta(layer, q, k, v, x, decay):
    beta = torch.sigmoid(layer.beta_proj(x)) * (2 if layer.allow_negative_eigenvalues else 1)
    return recurrence(unit(q), unit(k), v, decay, beta) * q.shape[-1] ** -0.5


def deltanet(layer, q, k, v, x):
    q, k, v = convolved(layer.conv, q, k, v)
    return silu_gated(layer, delta(layer, q, k, v, x, torch.ones_like(k)), x)


def gated_deltanet(layer, q, k, v, x):
    q, k, v = convolved(layer.conv, q, k, v)
    decay = (-softplus_rate(layer.log_decay, layer.decay_proj(x))[0]).exp()
    return silu_gated(layer, delta(layer, q, k, v, x, decay[..., None]), x)


def deltaproduct(layer, q, k, v, x):
    """Each token as n, the first of which forgets, the last of which is read."""
    n = layer.num_householders
    q, *rest = convolved(layer.conv, q, *[k] * n, *[v] * n)
    keys, values = unit(torch.stack(rest[:n], dim=2)), torch.stack(rest[n:], dim=2)
    beta = 2 * torch.sigmoid(layer.beta_proj(x)).unflatten(-1, (n, -1))
    decay = torch.ones_like(beta)
    decay[:, :, 0] = (-softplus_rate(layer.log_decay, layer.decay_proj(x))[0]).exp()
    every = unit(q)[:, :, None].expand_as(keys)
    steps = (y.flatten(1, 2) for y in (every, keys, values, decay[..., None], beta))
    return silu_gated(layer, recurrence(*steps)[:, n - 1 :: n] * q.shape[-1] ** -0.5, x)


def kda(layer, q, k, v, x):
    q, k, v = convolved(layer.conv, q, k, v)
    decay = (-softplus_rate(layer.log_decay, per_head(layer.decay_proj, x, k))[0]).exp()
    o = rms_norm(delta(layer, q, k, v, x, decay), layer.norm.weight)
    return o * torch.sigmoid(per_head(layer.gate_proj, x, o))


def mamba2(layer, q, k, v, x):
    v, k, q = convolved(layer.conv, v, k, q)
    rate, dt = softplus_rate(layer.log_decay, layer.dt_proj(x))
    decay = 2 * (-rate).exp() - 1 if layer.allow_negative_eigenvalues else (-rate).exp()
    o = recurrence(q, k, dt[..., None] * v, decay[..., None]) + layer.D[:, None] * v
    gate = per_head(layer.gate_proj, x, o)
    return rms_norm(o * gate * torch.sigmoid(gate), layer.norm.weight.view(o.shape[2:]))


def gla(layer, q, k, v, x):
    decay = torch.sigmoid(per_head(layer.decay_proj, x, k)) ** (1 / layer.gate_logit_normalizer)
    return silu_gated(layer, recurrence(q, k, v, decay) * q.shape[-1] ** -0.5, x)


def retnet(layer, q, k, v, x):
    pairs = q.shape[-1] // 2
    angle = torch.arange(q.shape[1])[:, None] * layer.rope_base ** (-torch.arange(pairs, dtype=q.dtype) / pairs)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(y[..., :pairs], y[..., pairs:]) * turn for y in (q, k))
    q, k = (torch.cat([y.real, y.imag], dim=-1) for y in (q, k))
    decay = (1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=v.dtype)))[:, None].expand_as(k)
    return silu_gated(layer, recurrence(q, k, v, decay) * v.shape[-1] ** -0.5, x)


def linear_attention(layer, q, k, v, x):
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
    o = recurrence(q, k, F.pad(v, (0, 1), value=1.0), torch.ones_like(k))
    return o[..., :-1] / (o[..., -1:] + 1e-6)


def lightning(layer, q, k, v, x):
    q, k = (y * torch.sigmoid(y) for y in (q, k))
    slope = (1 + 1e-5) * 2 ** (-8 * torch.arange(1, q.shape[2] + 1, dtype=q.dtype) / q.shape[2])
    o = recurrence(q, k, v, (-slope).exp()[:, None].expand_as(k))
    return rms_norm(o.flatten(2), layer.norm.weight) * layer.gate_proj(x)


def lightnet(layer, q, k, v, x):
    weights = k.exp() / k.exp().cumsum(dim=1)
    before = F.pad(k.exp().cumsum(dim=1)[:, :-1], (0, 0, 0, 0, 1, 0))
    o = recurrence(q * torch.sigmoid(q), weights, v, before / k.exp().cumsum(dim=1)).flatten(2)
    gate = layer.gate_proj(x)
    return rms_norm(o, layer.norm.weight) * gate * torch.sigmoid(gate)


EQUATIONS = {
    "DeltaNet": deltanet,
    "GatedDeltaNet": gated_deltanet,
    "DeltaProduct": deltaproduct,
    "KimiDeltaAttention": kda,
    "Mamba2": mamba2,
    "GatedLinearAttention": gla,
    "MultiScaleRetention": retnet,
    "LinearAttention": linear_attention,
    "LightningAttention": lightning,
    "LightNet": lightnet,
}
