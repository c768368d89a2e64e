"""Layers on other machines, over loopback: the same tokens and the same slots as here; servers that must not be sent a node; servers
that go away."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tca_gguf.errors import TcaError
from tca_gguf.llama import program

CLIENT = Path(__file__).with_name("rpc_client.py")
HEADER = Path(__file__).parents[2] / "native" / "ops" / "tca-ops.h"


def node_of_ours() -> re.Pattern[bytes]:
    """The op_params of any node: no function, GGML_N_TASKS_MAX, the operation, the mark of this version."""
    magic = re.search(r"TCA_MAGIC = (0x[0-9a-f]+);", HEADER.read_text())
    assert magic
    return re.compile(re.escape(struct.pack("<qi", 0, -1)) + b"...." + re.escape(struct.pack("<I", int(magic[1], 16))), re.DOTALL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server() -> Iterator[tuple[int, subprocess.Popen]]:
    try:
        path = program("rpc-server")
    except TcaError as error:
        pytest.skip(str(error))
    port = free_port()
    process = subprocess.Popen([path, "-H", "127.0.0.1", "-p", str(port), "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        yield port, process
    finally:
        process.kill()
        process.wait()


class Proxy:
    """Passes one connection after another on to a server, changing bytes on the way; keeps what the client sent."""

    def __init__(self, port: int, to_server: tuple[bytes, bytes] | None = None, greeting: int | None = None) -> None:
        self.sent, self.port_behind, self.to_server, self.greeting = bytearray(), port, to_server, greeting
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            behind = socket.create_connection(("127.0.0.1", self.port_behind))
            threading.Thread(target=self._pump, args=(client, behind, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(behind, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        first = not up
        try:
            while data := source.recv(1 << 16):
                if up:
                    self.sent += data
                    if self.to_server:
                        data = data.replace(*self.to_server)
                elif first and self.greeting is not None and len(data) >= 12:
                    data = data[:11] + bytes([self.greeting]) + data[12:]  # size (8), major, minor, patch, greeting
                    first = False
                target.sendall(data)
        except OSError:
            pass
        for s in (source, target):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def client(model: Path, servers: str, mode: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(CLIENT.parent)}
    return subprocess.Popen([sys.executable, CLIENT, str(model), servers, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def local(tca_model: Path) -> dict:
    return result(client(tca_model, "-", "run"))


@pytest.mark.slow
@pytest.mark.parametrize("n_servers", [1, 2])
def test_the_same_as_here(tca_model: Path, local: dict, n_servers: int) -> None:
    with server() as (one, _), server() as (two, _):
        ports = [one, two][:n_servers]
        remote = result(client(tca_model, ",".join(f"127.0.0.1:{p}" for p in ports), "run"))
    assert "refused" not in remote, remote
    assert remote["tokens"] == local["tokens"]
    assert remote["kept"] == local["kept"]
    assert remote["state"] == local["state"]
    assert remote["loaded"] and remote["again"] == remote["then"] == local["then"]


def test_a_stock_server_is_refused_before_it_is_sent_a_node(tca_model: Path) -> None:
    with server() as (port, _):
        proxy = Proxy(port, greeting=0)  # all that tells a stock server apart
        answer = result(client(tca_model, f"127.0.0.1:{proxy.port}", "run"))
    line = answer["refused"].strip().splitlines()
    assert any(f"127.0.0.1:{proxy.port}" in text and "not tca-gguf's; start it there with: tca-gguf exec rpc-server" in text for text in line), line
    assert len(proxy.sent) > 1 << 20  # the weights
    assert not node_of_ours().search(proxy.sent)


def test_a_server_of_ours_is_sent_them(tca_model: Path, local: dict) -> None:
    with server() as (port, _):
        proxy = Proxy(port)  # changes nothing: the control of the test above
        remote = result(client(tca_model, f"127.0.0.1:{proxy.port}", "run"))
    assert remote["tokens"] == local["tokens"]
    assert node_of_ours().search(proxy.sent)


def test_another_build_is_refused(tca_model: Path) -> None:
    with server() as (port, _):
        proxy = Proxy(port, to_server=(b"tca 0.", b"tca 9."))
        answer = result(client(tca_model, f"127.0.0.1:{proxy.port}", "run"))
    assert "another build of tca-gguf; install the same on both machines" in answer["refused"], answer


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_server_that_dies_gives_an_error(tca_model: Path, mode: str) -> None:
    before = tca_model.read_bytes()
    with server() as (port, process):
        running = client(tca_model, f"127.0.0.1:{port}", mode)
        assert running.stdout is not None
        for line in running.stdout:
            if json.loads(line).get("position", 0) >= (1000 if mode == "prefill" else 305):
                break
        process.send_signal(signal.SIGKILL)
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err[-2000:]  # no abort, no hang
    lines = [json.loads(line) for line in out.splitlines()]
    failed = next(line for line in lines if "seconds" in line)
    assert failed["status"] < 0 and failed["seconds"] < 15
    assert any("is gone" in line for line in failed["log"]), failed
    assert lines[-1] == {"closed": True, "status": failed["status"]}
    assert tca_model.read_bytes() == before


@pytest.mark.parametrize("text", ["somewhere", "host:", ":1", "host:0", "host:70000", "host:x"])
def test_addresses_that_are_none(text: str) -> None:
    from tca_gguf.remote import parse_servers

    with pytest.raises(TcaError, match="give host:port"):
        parse_servers(text)


def test_a_server_that_is_not_there() -> None:
    from tca_gguf.remote import add_servers

    with pytest.raises(TcaError, match="cannot be reached"):
        add_servers(f"127.0.0.1:{free_port()}")
