"""A torch-free engine: Llama-shaped models over raddle's paged attention.

Needs `pip install 'raddle[engine]'` for models in a folder; NumPy alone runs dummy weights.
"""

from .config import ModelConfig
from .engine import Engine
from .reply import Output
from .sampling import SamplingParams, TokenLogprob
from .tokenizer import Tokenizer

__all__ = ["Engine", "ModelConfig", "Output", "SamplingParams", "TokenLogprob", "Tokenizer"]
