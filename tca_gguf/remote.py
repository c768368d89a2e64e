"""Layers on other machines: llama.cpp's RPC backend.

On each machine `tca-gguf exec rpc-server -H 0.0.0.0 -p 50052`, of the same build of tca-gguf; then `Llama(..., rpc_servers="host:50052")`.
llama.cpp's own programs take `--rpc host:50052`. The protocol has no authentication and no encryption: trusted networks only.
"""

from __future__ import annotations

import ctypes
import socket

from tca_gguf.errors import TcaError
from tca_gguf.llama import lib_dir, load

_registered: set[str] = set()


def parse_servers(text: str) -> list[tuple[str, int]]:
    """[(host, port)] of "host:port,host:port"."""
    servers = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        host, _, port = part.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise TcaError(f"RPC server {part!r}: give host:port, as in 192.168.1.7:50052")
        servers.append((host, int(port)))
    return servers


def add_servers(text: str) -> None:
    """Registers the devices of RPC servers with llama.cpp, for the life of the process: models loaded from now on may use them.

    text: "host:port,...". TcaError if one cannot be reached: llama.cpp itself would end the process.
    """
    load().llama_cpp.llama_backend_init()
    name = next((p for p in lib_dir().iterdir() if p.name in ("libggml.so", "libggml.dylib", "ggml.dll")), lib_dir() / "libggml.so")
    ggml = ctypes.CDLL(str(name))
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    base = ctypes.CDLL(str(name.with_name(name.name.replace("ggml", "ggml-base"))))
    base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    base.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    rpc = ggml.ggml_backend_reg_by_name(b"RPC")
    address = rpc and base.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
    if not address:
        raise TcaError("this build has no RPC backend; reinstall without -DGGML_RPC=OFF in CMAKE_ARGS")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    for host, port in parse_servers(text):
        endpoint = f"{host}:{port}"
        if endpoint in _registered:
            continue
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            raise TcaError(f"RPC server {endpoint} cannot be reached ({error}); start it there with: tca-gguf exec rpc-server -H {host} -p {port}") from None
        reg = add(endpoint.encode())
        if not reg:
            raise TcaError(f"RPC server {endpoint} offers no devices")
        ggml.ggml_backend_register(reg)
        _registered.add(endpoint)
