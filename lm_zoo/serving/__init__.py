"""Many texts written at once by one model: an engine for Python, and the OpenAI protocol over HTTP.

slots.py       the states of the texts being written, one row each, in use without gaps
reader.py      prompts, read a piece at a time and in turns
sampling.py    how each text chooses its tokens
text.py        tokens to text as it grows, and the strings that end it
request.py     one text: what was asked, what came of it
engine.py      the loop over all of them

Over HTTP, with the extra `serve`: protocol.py, app.py, guard.py, metrics.py, server.py.
"""

from lm_zoo.serving.engine import Engine, PromptTooLong
from lm_zoo.serving.request import Closed, Completion, EngineError, Piece, QueueFull, Request
from lm_zoo.serving.sampling import Logprobs, Sampling

__all__ = [
    "Closed",
    "Completion",
    "Engine",
    "EngineError",
    "Logprobs",
    "Piece",
    "PromptTooLong",
    "QueueFull",
    "Request",
    "Sampling",
]
