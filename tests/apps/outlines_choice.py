"""outlines: outlines_choice.py MODEL, the question on stdin. The answer was asked for as one of two words; outlines 1.3.3 lets the model answer with a sentence."""

import sys
from typing import Literal

import outlines
from llama_cpp import Llama

model = outlines.from_llamacpp(Llama(sys.argv[1], n_ctx=4096))
print(model(sys.stdin.read(), Literal["marigold", "tulip"], max_tokens=12, temperature=0.0))
