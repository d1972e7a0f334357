"""Measuring models: perplexity, speed, tasks, and a look at what goes on inside."""

from lm_zoo.eval.implicit_attention import ImplicitAttention, implicit_attention

__all__ = ["ImplicitAttention", "implicit_attention"]
