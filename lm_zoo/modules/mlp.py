"""The channel mixer of every block."""

import torch.nn.functional as F
from torch import Tensor, nn

from lm_zoo.modules.cut import Cut


class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def cut(self) -> Cut:
        return Cut(columns=("gate_proj", "up_proj"), row="down_proj", counts=())

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
