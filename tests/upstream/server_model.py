"""A pytest plugin that lets llama.cpp's own server tests run without a network, on one file: pytest -p server_model

Those tests download a small model each. Here every server of theirs starts with the file in TCA_SERVER_MODEL in its place, with
the extra arguments in TCA_SERVER_ARGS, and a test that needs another download is skipped. Some assertions are about what the
other model says; they fail here whatever the cache. So that such a one does not end its test, `run.py` has every
`assert condition` of the test files written as `tca_check(line, condition)`: a test goes on, and the lines that failed are its
result, one JSON object a test in TCA_RESULTS. Two caches are the same to the tests if those lists are.
"""

from __future__ import annotations

import builtins
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import utils  # llama.cpp's tools/server/tests/utils.py

MODEL = os.environ["TCA_SERVER_MODEL"]
ARGS = shlex.split(os.environ.get("TCA_SERVER_ARGS", ""))
LOADED_BY_NAME = ("model_hf_repo", "model_hf_file", "model_url", "mmproj_url")
popen, start = utils.subprocess.Popen, utils.ServerProcess.start
failed: dict[int, str] = {}  # lines of the running test whose condition was false, with what was compared


def tca_check(line: int, condition: object, values: str = "") -> None:
    if not condition:
        failed.setdefault(line, values)


def start_with_the_model(self: utils.ServerProcess, timeout_seconds: int = utils.DEFAULT_HTTP_TIMEOUT) -> None:
    """ServerProcess.start of one model; a router (which has none of its own) is left as it is."""
    router = self.model_file is None and all(getattr(self, name) is None for name in LOADED_BY_NAME)
    if not router:
        for name in LOADED_BY_NAME:
            setattr(self, name, None)
        self.model_file = MODEL

    def popen_with_args(command: list[str], **options: Any) -> Any:
        return popen([*command, *ARGS], **options)

    utils.subprocess.Popen = popen if router else popen_with_args
    try:
        start(self, timeout_seconds)
    finally:
        utils.subprocess.Popen = popen


def no_download(url: str, output_file_path: str | None = None) -> str:
    if url.endswith("/stories15M-q4_0.gguf"):  # the draft model of the speculative tests: the model drafts for itself
        return MODEL
    pytest.skip(f"needs {url}")


builtins.tca_check = tca_check  # type: ignore[attr-defined]
utils.ServerProcess.start = start_with_the_model
utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.download_file = no_download


def pytest_runtest_setup(item: pytest.Item) -> None:
    failed.clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.when != "call" and report.passed:
        return
    row: dict[str, Any] = {"test": item.nodeid, "outcome": report.outcome, "failed": {}, "error": ""}
    if report.skipped:
        row["error"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    elif report.failed and call.excinfo is not None:
        row["error"] = f"{call.excinfo.typename}: {str(call.excinfo.value).partition(chr(10))[0][:300]}"
        died = [s.process.poll() for s in utils.server_instances if s.process is not None and s.process.poll() is not None]
        if died:
            row["error"] += f" (the server ended with {died[0]})"
    if failed:
        row["failed"] = {str(line): values for line, values in sorted(failed.items())}
        row["outcome"] = "failed"
    with open(os.environ["TCA_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
