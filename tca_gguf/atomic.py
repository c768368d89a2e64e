"""Replacing a file so that at every moment either the old or the new one is there, complete.

The new content goes to a temporary file beside the target, is flushed to the disk, checked, and then renamed over the
target; the directory is flushed last. A killed process leaves a ``.tca-gguf-XXXXXXXX.tmp`` file; the next write into that
directory removes it. A running writer holds a lock on its temporary file, which is how the two are told apart.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import TcaError

try:
    import fcntl
except ImportError:  # Windows: stale files are then left to the user
    fcntl = None  # type: ignore[assignment]

PREFIX, SUFFIX = ".tca-gguf-", ".tmp"
STALE_SECONDS = 10.0  # younger files may belong to a writer that has not taken its lock yet


def replace_file(
    target: str | os.PathLike[str],
    size: int,
    write: Callable[[BinaryIO, Path], None],
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Makes ``target`` a file with the content that ``write(file, path)`` writes; about ``size`` bytes must be free.

    A symbolic link is followed: the file it names is replaced. An existing file keeps its permissions and owner.
    ``verify(path)`` sees the complete new file before it takes its place. Raises TcaError (or what the callbacks raise);
    the target is then as it was, and the temporary file is gone.
    """
    real = Path(os.path.realpath(target))
    old = check_target(real, size)
    temp = real.parent / f"{PREFIX}{secrets.token_hex(4)}{SUFFIX}"
    try:
        # a new file gets the permissions that any program would give it; an old one's are copied before the rename
        handle = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600 if old else 0o666)
    except OSError as error:
        raise _as_tca_error(error, real, size) from None
    try:
        with os.fdopen(handle, "w+b") as out:
            if fcntl is not None:
                fcntl.flock(out, fcntl.LOCK_EX)
            write(out, temp)
            out.flush()
            os.fsync(out.fileno())
            if verify is not None:
                verify(temp)
            _copy_ownership(temp, old)
            os.replace(temp, real)
        _fsync_directory(real.parent)
    except BaseException as error:  # KeyboardInterrupt too
        temp.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _as_tca_error(error, real, size) from None
        raise


def replace_text(target: str | os.PathLike[str], text: str) -> None:
    """`replace_file` with a text, as UTF-8: at every moment the old or the new one is there."""
    data = text.encode()
    replace_file(target, len(data), lambda file, _: file.write(data))


def check_target(target: str | os.PathLike[str], size: int) -> os.stat_result | None:
    """What can be known before any work is done: TcaError if ``target`` cannot be replaced by ``size`` bytes.

    Removes what killed writers left in its directory. Returns the target's stat, None if it does not exist yet.
    """
    real = Path(os.path.realpath(target))
    old = _writable_or_refuse(real)
    remove_stale(real.parent)
    free = shutil.disk_usage(real.parent).free
    if free < size:
        raise _disk_full(real, size, free)
    return old


def remove_stale(directory: Path) -> list[Path]:
    """Removes temporary files that killed writers left in ``directory``; returns them."""
    removed = []
    if fcntl is None:
        return removed
    for path in directory.glob(f"{PREFIX}*{SUFFIX}"):
        try:
            if time.time() - path.stat().st_mtime < STALE_SECONDS:
                continue
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            removed.append(path)
        except OSError:
            continue  # in use, or not ours to remove
    return removed


def _writable_or_refuse(real: Path) -> os.stat_result | None:
    try:
        old = os.stat(real)
    except FileNotFoundError:
        if not real.parent.is_dir():
            raise TcaError(f"{real}: the directory {real.parent} does not exist") from None
        old = None
    except OSError as error:
        raise TcaError(f"{real} cannot be written: {error.strerror}") from None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise TcaError(f"{real} is not a regular file; name another output with -o")
    # a rename would succeed on a read-only file: whoever made it read-only does not want that
    if old is not None and (old.st_mode & 0o222 == 0 or not os.access(real, os.W_OK)):
        raise TcaError(f"{real} is read-only; make it writable (chmod u+w) or name another output with -o")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise TcaError(f"the directory {real.parent} cannot be written; name another output with -o")
    return old


def _copy_ownership(temp: Path, old: os.stat_result | None) -> None:
    if old is None:
        return
    if hasattr(os, "chown"):
        try:
            os.chown(temp, old.st_uid, old.st_gid)
        except OSError:
            pass  # only root may give a file away
    os.chmod(temp, stat.S_IMODE(old.st_mode))


def _fsync_directory(directory: Path) -> None:
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return  # directories cannot be opened everywhere
    try:
        os.fsync(handle)
    except OSError:
        pass  # nor flushed; the rename itself has happened
    finally:
        os.close(handle)


def _disk_full(real: Path, size: int, free: int) -> TcaError:
    return TcaError(
        f"not enough room in {real.parent}: {size / 1e6:,.0f} MB needed beside the original, {free / 1e6:,.0f} MB free; "
        "make room or name an output on another disk with -o"
    )


def _as_tca_error(error: OSError, real: Path, size: int) -> TcaError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = shutil.disk_usage(real.parent).free
        except OSError:
            free = 0
        return _disk_full(real, size, free)
    if error.errno == errno.EFBIG:
        return TcaError(f"{real}: a file of {size / 1e6:,.0f} MB is larger than this system or `ulimit -f` allows")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TcaError(f"the directory {real.parent} cannot be written ({error.strerror}); name another output with -o")
    return TcaError(f"{real} cannot be written: {error.strerror or error}")
