"""LlamaIndex's LlamaCPP: llama_index_complete.py MODEL, the question on stdin."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP


def as_prompt(messages):
    return "".join(f"<|im_start|>{m.role.value}\n{m.content}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


llm = LlamaCPP(model_path=sys.argv[1], context_window=4096, max_new_tokens=24, temperature=0.0, messages_to_prompt=as_prompt,
               completion_to_prompt=lambda text: text, verbose=True)  # fmt: skip
print(llm.chat([ChatMessage(role="user", content=sys.stdin.read())]).message.content)
