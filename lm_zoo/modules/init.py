"""Initial values that `torch.nn.init` has no function for."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def fill_(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy `value` (broadcast) into the parameter, unless transformers has just loaded it from a checkpoint.

    When some weights are missing in a checkpoint, transformers calls `reset_parameters` on modules that are loaded in
    part; the functions of `torch.nn.init` then pass over what was loaded, which a plain copy would overwrite.
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
