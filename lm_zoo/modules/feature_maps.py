"""Feature maps phi of linear attention: phi(q) . phi(k) stands in for exp(q . k).

Each is a module from `[B, T, H, K]` to `[B, T, H, size]`, computed in float32 at least and returned in that dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.modules.init import fill_


class FeatureMap(nn.Module):
    """The identity, and base of the others.

    Attributes:
        size: features per head.
        positive: whether no feature is below 0, or at least no inner product of two maps: what a denominator needs.
    """

    positive = False

    def __init__(self, num_heads: int, key_size: int):
        super().__init__()
        self.size = key_size

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))


class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236)."""

    positive = True

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(super().forward(x)) + 1


class ReLU(FeatureMap):
    """phi(x) = max(x, 0)."""

    positive = True

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class SquaredReLU(FeatureMap):
    """phi(x) = max(x, 0)^2."""

    positive = True

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x)).square()


class Taylor(FeatureMap):
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K) (Based, Arora et al. 2024, arXiv 2402.18668).

    The paper's features are 1, x and all products x_i x_j. Here x_i x_j and x_j x_i are one feature, times sqrt(2):
    the same inner products from 1 + K + K (K + 1) / 2 features.
    """

    positive = True  # 1 + s + s^2 / 2 >= 1 / 2

    def __init__(self, num_heads: int, key_size: int):
        super().__init__(num_heads, key_size)
        self.key_size = key_size
        self.size = 1 + key_size + key_size * (key_size + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x) * self.key_size**-0.25
        i, j = torch.triu_indices(self.key_size, self.key_size, device=x.device)
        weight = x.new_ones(len(i)).masked_fill(i == j, 0.5**0.5)
        return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weight], dim=-1)


class Hedgehog(FeatureMap):
    """phi(x) = softmax([W x, -W x]) with W `[K, K]` learned per head, at first the identity.

    Zhang et al. 2024, arXiv 2402.04347, in its numerically stable form: the softmax over the features.
    """

    positive = True

    def __init__(self, num_heads: int, key_size: int):
        super().__init__(num_heads, key_size)
        self.size = 2 * key_size
        self.weight = nn.Parameter(torch.empty(num_heads, key_size, key_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_(self.weight, torch.eye(self.weight.shape[-1], device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = _per_head(self.weight, x)
        return torch.cat([y, -y], dim=-1).softmax(dim=-1)


class HalvedHedgehog(Hedgehog):
    """phi(x) = [softmax(W x), softmax(-W x)]: a softmax over each half, as LoLCATs (arXiv 2410.10254) has it."""

    def forward(self, x: Tensor) -> Tensor:
        y = _per_head(self.weight, x)
        return torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)


class T2R(FeatureMap):
    """phi(x) = max(W x + b, 0) with W `[K, K]` and b learned per head (Kasai et al. 2021, arXiv 2103.13076)."""

    positive = True

    def __init__(self, num_heads: int, key_size: int):
        super().__init__(num_heads, key_size)
        self.weight = nn.Parameter(torch.empty(num_heads, key_size, key_size))
        self.bias = nn.Parameter(torch.empty(num_heads, key_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = _per_head(self.weight, x)
        return F.relu(y + self.bias.to(y.dtype))


def _per_head(weight: Tensor, x: Tensor) -> Tensor:
    """W_h x of each head: `[H, K, K]` and `[B, T, H, K]` to `[B, T, H, K]`, in float32 at least."""
    rows = x.permute(2, 0, 1, 3).flatten(1, 2)  # [H, B * T, K]
    y = (rows @ weight.to(x.dtype).mT).unflatten(1, x.shape[:2]).permute(1, 2, 0, 3)
    return y.to(torch.promote_types(y.dtype, torch.float32))


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": EluPlusOne,
    "relu": ReLU,
    "squared_relu": SquaredReLU,
    "identity": FeatureMap,
    "taylor": Taylor,
    "hedgehog": Hedgehog,
    "t2r": T2R,
}
