"""openai over llama-server: client_openai.py URL, the question on stdin."""

import sys

from openai import OpenAI

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
answer = client.chat.completions.create(model="any", messages=[{"role": "user", "content": sys.stdin.read()}], max_tokens=24, temperature=0)
print(answer.choices[0].message.content)
