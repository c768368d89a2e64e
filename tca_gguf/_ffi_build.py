"""Writes the C source of the extension module tca_gguf._tca: python _ffi_build.py OUTPUT.c

The build calls it (cmake/binding.cmake). cffi reads the declarations in _ffi.cdef.txt; the compiler then checks each
of them against native/include/tca.h.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI

ffi = FFI()
ffi.cdef(Path(__file__).with_name("_ffi.cdef.txt").read_text(encoding="utf-8"))
ffi.set_source("tca_gguf._tca", '#include "tca.h"\n')

if __name__ == "__main__":
    ffi.emit_c_code(sys.argv[1])
