"""litellm over llama-server: client_litellm.py URL, the question on stdin."""

import sys

from litellm import completion

answer = completion(model="openai/any", api_base=f"{sys.argv[1]}/v1", api_key="none", max_tokens=24, temperature=0,
                    messages=[{"role": "user", "content": sys.stdin.read()}])  # fmt: skip
print(answer.choices[0].message.content)
