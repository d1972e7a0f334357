"""Linearization: a pretrained transformer in, a linear-attention model in a Hugging Face folder out.

model, report = linearize("path/of/a/llama", spec="lolcats", data="my.txt", output="out")
"""

from lm_zoo.train.linearize.run import linearize
from lm_zoo.train.linearize.spec import LinearizeSpec, Recover, Transfer

__all__ = ["LinearizeSpec", "Recover", "Transfer", "linearize"]
