"""llama.cpp's log: kept out of sight, but at hand when something fails."""

from __future__ import annotations

import ctypes
import re
import sys
from collections import deque
from types import ModuleType

_DEBUG, _WARN, _ERROR, _CONTINUED = 1, 3, 4, 5  # enum ggml_log_level


class LlamaLog:
    """Takes over the log of llama.cpp and ggml. verbose: print it on stderr, but for its debug lines; otherwise print nothing.

    The lines of errors and warnings are remembered, for `reason`. Keep the object alive as long as the library is used.
    """

    def __init__(self, llama_cpp: ModuleType, verbose: bool = False) -> None:
        self.verbose = verbose
        self.lines: deque[tuple[int, str]] = deque(maxlen=100)
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._receive)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        shown = text.decode("utf-8", "replace")
        if level == _CONTINUED:
            level = self._level
        self._level = level
        if level in (_WARN, _ERROR):
            self.lines.append((level, shown.strip()))
        if self.verbose and level != _DEBUG:  # thousands of lines about a graph
            print(shown, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        self.lines.clear()

    def reason(self) -> str:
        """What the log says about a failure, in one line; "" if it says nothing."""
        errors = [line for level, line in self.lines if level == _ERROR and line]
        # the first error is the cause, the later ones say that this and that failed because of it
        telling = [line for line in errors if "tca" in line.lower()] or errors
        if not telling:
            return ""
        line = re.sub(r"^\w+: (error loading model: )?", "", telling[0].replace("\n", " "))
        return "".join(c if c.isprintable() else "?" for c in line)[:400].rstrip(".")

    def explain(self, error: Exception) -> str:
        """The error's text, and behind it what the log says about it, if that is more."""
        reason = self.reason()
        return f"{error}: {reason}" if reason and reason not in str(error) else str(error)


_log: LlamaLog | None = None


def take_over(llama_cpp: ModuleType, verbose: bool = False) -> LlamaLog:
    """The one LlamaLog of this process, switched to ``verbose`` and emptied."""
    global _log
    if _log is None:
        _log = LlamaLog(llama_cpp, verbose)
    _log.verbose = verbose
    _log.clear()
    return _log
