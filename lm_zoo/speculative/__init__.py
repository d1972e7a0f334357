"""Speculative decoding: cheap guesses at the next tokens, which the model reads in one call and keeps as it agrees.

speculate(model, input_ids, draft=small_model, max_new_tokens=200)      a smaller model with the same vocabulary guesses
speculate(model, input_ids, lookup=3, max_new_tokens=200)               what followed these three tokens before
speculate(model, input_ids, early_layers=2, max_new_tokens=200)         the model's own first layers guess
"""

from lm_zoo.speculative.acceptance import Sampling, accept
from lm_zoo.speculative.decoding import Speculation, speculate
from lm_zoo.speculative.drafts import Draft, EarlyLayers, Lookup, ModelDraft, early_exit

__all__ = [
    "Draft",
    "EarlyLayers",
    "Lookup",
    "ModelDraft",
    "Sampling",
    "Speculation",
    "accept",
    "early_exit",
    "speculate",
]
