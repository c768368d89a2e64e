#!/usr/bin/env bash
# gguf 0.19.0: an array without elements.
#
# A good guess: GGUFWriter writes what it is given, and gguf-new-metadata copies what GGUFReader reads. Seen: add_array(key, []) writes no
# key and says nothing; a file that does hold an empty array (other writers make them) is read; and gguf-new-metadata, copying such a file
# with an unrelated key added, ends with a ValueError and leaves an output file behind that cannot be read.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.2.6

cat > run.py <<'PYTHON'
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


writer = gguf.GGUFWriter("written.gguf", "llama")
writer.add_array("test.empty", [])
writer.add_array("test.full", [1, 2])
writer.add_tensor("t", np.zeros(32, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
keys = {field.name for field in gguf.GGUFReader("written.gguf").fields.values()}
print("written with an empty and a full array, keys in the file:", sorted(k for k in keys if k.startswith("test.")))
assert "test.full" in keys and "test.empty" not in keys, "the behaviour has changed"

# the same by hand: magic, version 3, one tensor, two keys; type 8 is a string, 9 an array, 5 its int32 elements
head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
head += string("general.architecture") + struct.pack("<I", 8) + string("llama")
head += string("test.empty") + struct.pack("<IIQ", 9, 5, 0)
head += string("t") + struct.pack("<IQIQ", 1, 32, 0, 0)
head += bytes(-len(head) % 32)
Path("empty.gguf").write_bytes(head + bytes(128))
field = gguf.GGUFReader("empty.gguf").get_field("test.empty")
print("read from a file that holds one:", field.types, len(field.data), "elements")
assert len(field.data) == 0, "the behaviour has changed"

run = subprocess.run([Path(sys.executable).with_name("gguf-new-metadata"), "--general-name", "x", "empty.gguf", "copied.gguf"],
                     capture_output=True, text=True)
last = next((line for line in run.stderr.splitlines() if line.startswith("ValueError")), run.stderr[-200:])
print("gguf-new-metadata: exit code", run.returncode, "|", last)
assert run.returncode != 0 and last.startswith("ValueError") and Path("copied.gguf").exists(), "the behaviour has changed"
try:
    gguf.GGUFReader("copied.gguf")
    raise SystemExit("the behaviour has changed: the copy can be read")
except (ValueError, IndexError) as error:
    print("the file that it leaves, of", Path("copied.gguf").stat().st_size, "bytes:", type(error).__name__)
PYTHON
venv/bin/python run.py
