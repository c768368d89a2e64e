"""LangChain's ChatLlamaCpp: langchain_chat.py MODEL, the question on stdin."""

import sys

from langchain_community.chat_models import ChatLlamaCpp

chat = ChatLlamaCpp(model_path=sys.argv[1], n_ctx=4096, n_batch=512, max_tokens=24, temperature=0, verbose=True)
print(chat.invoke(sys.stdin.read()).content)
