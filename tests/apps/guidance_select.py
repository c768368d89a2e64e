"""guidance: guidance_select.py MODEL, the question on stdin. The answer is one of two words, by grammar."""

import sys

from guidance import assistant, models, select, user

lm = models.LlamaCpp(sys.argv[1], n_ctx=4096, echo=False)
with user():
    lm += sys.stdin.read()
with assistant():
    lm += select(["marigold", "tulip"], name="answer")
print(lm["answer"])
