"""The commands of the chat, and what counts as one message, over a Llama that only counts."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time

import pytest

import test_chat
from tca_gguf.chat import Chat, Engine
from tca_gguf.cli.chat import HELP, Conversation, Messages
from test_chat import FakeLlama

fake_library = test_chat.fake_library


@pytest.fixture
def converse(monkeypatch, capsys):
    """converse(chat, lines of a pipe...) -> (stdout, stderr)."""

    def run(chat: Chat, *lines: str) -> tuple[str, str]:
        waiting = iter(lines)

        def give(prompt: str) -> str:
            assert prompt == ""
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", give)
        Conversation(chat, Messages(interactive=False)).run()
        return capsys.readouterr()

    return run


def talk(**options) -> Chat:
    return Chat(Engine(FakeLlama(n_ctx=2000, dense=20, **options)))


def test_retry_undo_edit(converse):
    chat = talk()
    out, err = converse(chat, "one", "two", "/retry", "/regen", "/edit three", "/undo", "four", "/undo 2", "/undo")
    assert out == "hello\n" * 6
    assert err.splitlines() == ["(the last message taken back; 1 left)", "(the last 2 messages taken back; 0 left)", "error: nothing was asked yet"]
    assert chat.messages == [] and len(chat.turns) == 6


def test_what_cannot_be(converse):
    chat = talk()
    _, err = converse(chat, "/retry", "/edit x", "/edit", "one", "/edit", "/undo many", "/undo 0", "/read", "/what", "/exit", "never read")
    assert err.splitlines() == [
        *["error: nothing was asked yet"] * 3,
        "error: the message is empty; give its new text: /edit TEXT",
        "error: 'many' is no number of messages; give one, as in: /undo 2",
        "error: '0' is no number of messages; give one, as in: /undo 2",
        "error: give the path of a text file: /read FILE",
        "unknown command /what; /help lists them",
    ]
    assert chat.asked == ["one"]


def test_read(converse, tmp_path):
    chat = talk()
    (tmp_path / "a b.txt").write_text("first line\nsecond\n", encoding="utf-8")
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    _, err = converse(chat, f"/read {tmp_path}/a b.txt", "what is this?", "and this?", f"/read {tmp_path}/raw", f"/read {tmp_path}/none")
    assert chat.asked == ["first line\nsecond\n\n\nwhat is this?", "and this?"]
    assert "a b.txt: 18 characters, read with your next message)" in err and "raw is not UTF-8 text" in err and "cannot be read: No such file" in err


def test_messages_of_several_lines_over_a_pipe(converse):
    chat = talk()
    converse(chat, '"""', "/retry is no command here", "", "two", '"""', "/usr/bin/env is a path", '"""', "to the end")
    assert chat.asked == ["/retry is no command here\n\ntwo", "/usr/bin/env is a path", "to the end"]


def test_every_command_is_in_the_help(converse):
    out, _ = converse(talk(), "/help")
    assert out.strip() == HELP.strip()
    for command in ("/retry", "/regen", "/undo", "/edit", "/read", "/stats", "/reset", "/help", "/exit"):
        assert command in out


SCRIPT = """
from tca_gguf.cli.chat import Messages
messages = Messages(interactive=True)
for start in ("", "", "old text"):
    print("GOT", repr(messages.next(start)), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals there")
def test_a_paste_is_one_message():
    """A real terminal: a bracketed paste, a paste without brackets, and a text that is there to be changed."""
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    heard = b""

    def until(text: bytes) -> None:
        nonlocal heard
        end = time.time() + 60
        while text not in heard:
            ready, _, _ = select.select([master], [], [], max(0, end - time.time()))
            assert ready, heard
            heard += os.read(master, 4096)

    try:
        until(b"> ")
        os.write(master, b"\x1b[200~one\ntwo\nthree\x1b[201~\n")
        until(b"GOT 'one\\ntwo\\nthree'")
        heard = heard.rpartition(b"GOT")[2]
        until(b"> ")
        os.write(master, b"four\nfive\n")
        until(b"GOT 'four\\nfive'")
        heard = heard.rpartition(b"GOT")[2]
        until(b"old text")
        os.write(master, b", new\n")
        until(b"GOT 'old text, new'")
    finally:
        child.kill()
        child.wait()
        os.close(master)
