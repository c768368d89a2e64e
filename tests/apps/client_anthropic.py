"""anthropic over llama-server: client_anthropic.py URL, the question on stdin."""

import sys

from anthropic import Anthropic

client = Anthropic(base_url=sys.argv[1], api_key="none")
answer = client.messages.create(model="any", messages=[{"role": "user", "content": sys.stdin.read()}], max_tokens=24)
print("".join(block.text for block in answer.content if block.type == "text"))
