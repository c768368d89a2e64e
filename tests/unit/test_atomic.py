"""The file being replaced is never harmed: errors, full disks, kills, links, permissions."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from gguf_samples import make_budgets, write_gguf

from tca_gguf import atomic
from tca_gguf.atomic import PREFIX, SUFFIX, remove_stale, replace_file
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import embed_budgets, read_budgets

KILLS = 20
Usage = namedtuple("Usage", "total used free")


def temps(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{PREFIX}*{SUFFIX}"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    return path


def test_content_and_permissions(target):
    for mode in (0o640, 0o600, 0o644):
        os.chmod(target, mode)
        replace_file(target, 3, lambda out, _: out.write(b"new") and None)
        assert target.read_bytes() == b"new" and stat.S_IMODE(target.stat().st_mode) == mode
    assert temps(target.parent) == []


def test_a_new_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "n", 3, lambda out, _: out.write(b"new") and None)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "n").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), TcaError("x")])
@pytest.mark.parametrize("where", ["write", "verify"])
def test_a_failure_leaves_the_old_file_and_no_other(target, error, where):
    def fail(*_):
        raise error

    def write(out, _):
        out.write(b"half")

    with pytest.raises(type(error)):
        replace_file(target, 3, fail if where == "write" else write, fail if where == "verify" else None)
    assert target.read_bytes() == b"old" and os.listdir(target.parent) == ["m.gguf"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "not enough room"),
        (errno.EDQUOT, "not enough room"),
        (errno.EROFS, "cannot be written"),
        (errno.EFBIG, "ulimit"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_system_errors_are_one_line(target, code, text):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with pytest.raises(TcaError, match=text):
        replace_file(target, 3, fail)
    assert target.read_bytes() == b"old" and temps(target.parent) == []


def test_room_is_checked_first(target, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: Usage(100, 50, 50))
    with pytest.raises(TcaError, match="not enough room in .*51 MB needed beside the original, 0 MB free"):
        replace_file(target, 51_000_000, lambda *_: pytest.fail("must not be called"))


def test_a_symlink_is_followed(tmp_path, target):
    (tmp_path / "sub").mkdir()
    link = tmp_path / "sub" / "link.gguf"
    link.symlink_to(target)
    replace_file(link, 3, lambda out, _: out.write(b"new") and None)
    assert link.is_symlink() and target.read_bytes() == b"new" and temps(tmp_path / "sub") == []


def test_read_only_file(target):
    os.chmod(target, 0o444)
    with pytest.raises(TcaError, match=r"is read-only; .*chmod u\+w.* -o"):
        replace_file(target, 3, lambda *_: None)
    assert target.read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(target):
    os.chmod(target.parent, 0o555)
    try:
        with pytest.raises(TcaError, match="the directory .* cannot be written"):
            replace_file(target, 3, lambda *_: None)
    finally:
        os.chmod(target.parent, 0o755)


def test_targets_that_are_no_files(tmp_path):
    with pytest.raises(TcaError, match="not a regular file"):
        replace_file(tmp_path, 3, lambda *_: None)
    os.mkfifo(tmp_path / "pipe")  # not /dev/null: as root a failing test would replace it for the whole machine
    with pytest.raises(TcaError, match="not a regular file"):
        replace_file(tmp_path / "pipe", 3, lambda *_: None)
    with pytest.raises(TcaError, match="does not exist"):
        replace_file(tmp_path / "no" / "m.gguf", 3, lambda *_: None)


def test_stale_files_go_and_running_writers_stay(target):
    fcntl = pytest.importorskip("fcntl")
    long_ago = time.time() - 3600
    stale, running, fresh = (target.parent / f"{PREFIX}{i}{SUFFIX}" for i in range(3))
    for path in (stale, running, fresh):
        path.write_bytes(b"x")
    os.utime(stale, (long_ago, long_ago))
    os.utime(running, (long_ago, long_ago))
    with open(running, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_stale(target.parent) == [stale]
    assert running.exists() and fresh.exists() and target.exists()


def big_gguf(path: Path) -> Path:
    """About 48 MB, so that a kill lands while it is copied."""
    write_gguf(path)
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(random.Random(3).randbytes(48 << 20))
    return path


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from gguf_samples import make_budgets
from tca_gguf.gguf_file import embed_budgets, strip_budgets
budgets = make_budgets(1)
print("ready", flush=True)
while True:
    embed_budgets({path!r}, {path!r}, budgets)
    strip_budgets({path!r}, {path!r})
"""


def test_killed_at_random_moments(tmp_path):
    path = big_gguf(tmp_path / "m.gguf")
    plain = sha256(path)
    embed_budgets(path, tmp_path / "embedded.gguf", make_budgets(1))
    embedded = sha256(tmp_path / "embedded.gguf")
    rng, interrupted = random.Random(11), 0
    for _ in range(KILLS):
        code = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.25))
            child.send_signal(signal.SIGKILL)
        assert sha256(path) in (plain, embedded)
        read_budgets(path)
        left = temps(tmp_path)
        assert len(left) <= 1
        interrupted += len(left)
        for temp in left:
            os.utime(temp, (0, 0))
        assert remove_stale(tmp_path) == left
    assert interrupted >= KILLS // 4, "the kills came too early or too late to test anything"


def write_until_full(path: Path, monkeypatch) -> None:
    """embed_budgets into a directory without room, once with the check of free room and once without."""
    original = sha256(path)
    with pytest.raises(TcaError, match="not enough room"):
        embed_budgets(path, path, make_budgets())
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: Usage(1 << 50, 0, 1 << 50))
    with pytest.raises(TcaError, match="not enough room"):
        embed_budgets(path, path, make_budgets())
    assert sha256(path) == original and temps(path.parent) == []


def test_full_disk(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root; test_file_size_limit runs instead")
    try:
        write_until_full(big_gguf(disk / "m.gguf"), monkeypatch)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit(tmp_path):
    resource = pytest.importorskip("resource")
    path = big_gguf(tmp_path / "m.gguf")
    original = sha256(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, hard))
    try:
        with pytest.raises(TcaError, match="ulimit -f"):
            embed_budgets(path, path, make_budgets())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sha256(path) == original and temps(tmp_path) == []
