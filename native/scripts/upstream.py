"""The source step of the build: from the pin to a patched llama.cpp tree.

    python native/scripts/upstream.py prepare --cache build/upstream --cmake build/upstream.cmake
    python native/scripts/upstream.py stat

`prepare` takes the sdist that native/upstream.toml names (a local file, the cache, or pip), checks its sha256, unpacks
what the build needs into `<cache>/<version>-<hash of the patch series>`, applies the series in one call, verifies that
every patched file changed and carries our marker, and mirrors the result into `<cache>/source`, where only files whose
content differs are touched: an edited patch then recompiles the files it changes and no other.

`stat` prints the lines that the patch series adds and deletes.

Standard library only (tomli on Python 3.10). Every failure is one UpstreamError whose text says what to do.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
MARKER = b"tca"  # in every file that the series patches
LAYOUT = 2  # raise it when the choice of unpacked files changes

# What is unpacked, relative to the sdist's top folder. The rest (models, docs, web UI, examples: 160 MB) stays packed.
KEEP = (
    r"LICENSE\.md",
    r"llama_cpp/.*\.(py|typed)",
    r"llama_cpp/py\.typed",
    r"vendor/llama\.cpp/(CMakeLists\.txt|LICENSE|AUTHORS)",
    r"vendor/llama\.cpp/(cmake|common|ggml|include|licenses|src|vendor)/.*",
    r"vendor/llama\.cpp/scripts/.*\.cmake",
    r"vendor/llama\.cpp/tools/(?!ui/).*",
    r"vendor/llama\.cpp/tools/ui/[^/]*\.(txt|cmake|in)",
)
LLAMA = PurePosixPath("vendor/llama.cpp")


class UpstreamError(Exception):
    """What went wrong and what to do about it, in one paragraph."""


@dataclass(frozen=True)
class Pin:
    package: str
    version: str
    sdist: str
    sha256: str
    llama_cpp_commit: str
    ggml_version: str


def read_pin(path: Path) -> Pin:
    with open(path, "rb") as file:
        data = tomllib.load(file)
    try:
        return Pin(**{name: data[name] for name in Pin.__dataclass_fields__})
    except KeyError as error:
        raise UpstreamError(f"{path} has no key {error}. Compare it with the version in the repository.") from None


def patch_series(folder: Path) -> list[Path]:
    """The patches in the order they apply: by name, 0001-... first."""
    return sorted(folder.glob("*.patch"))


def series_hash(pin: Pin, patches: list[Path]) -> str:
    """12 hex digits over the sdist, the layout and the name and content of every patch."""
    digest = hashlib.sha256(f"{pin.sha256}\n{LAYOUT}\n".encode())
    for patch in patches:
        content = patch.read_bytes()
        digest.update(f"{patch.name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


# ---- the sdist -------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(pin: Pin, path: Path) -> None:
    found = sha256_of(path)
    if found != pin.sha256:
        raise UpstreamError(
            f"{path} has sha256 {found}, but native/upstream.toml pins {pin.package} {pin.version} to {pin.sha256}. "
            f"Delete that file and download it again; if it is the file you want, update the pin (native/README.md)."
        )


def find_sdist(pin: Pin, local: str | None, cache: Path) -> Path:
    """The checked sdist: the given file (or a folder that holds it), else the cache, else a download by pip."""
    if local:
        path = Path(local).expanduser()
        if path.is_dir():
            path = path / pin.sdist
        if not path.is_file():
            raise UpstreamError(
                f"TCA_SDIST: there is no file {path}. Give the path of {pin.sdist}, or leave TCA_SDIST out to have pip download it."
            )
        check_sha256(pin, path)
        return path
    path = cache / pin.sdist
    if not path.is_file() or sha256_of(path) != pin.sha256:
        download(pin, path)
    check_sha256(pin, path)
    return path


def download(pin: Pin, target: Path) -> None:
    """Downloads the sdist with this Python's pip, beside `target` first, so that no half file is ever taken for it."""
    log = target.with_name("pip-download.log")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
                   "--disable-pip-version-check", "--retries", "2", "--dest", folder, f"{pin.package}=={pin.version}"]
        with open(log, "wb") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        found = Path(folder) / pin.sdist
        if code == 0 and found.is_file():
            os.replace(found, target)
            return
    text = log.read_text(errors="replace")
    offline = (f"To build without a network, download it elsewhere (pip download --no-deps --no-binary :all: "
               f"{pin.package}=={pin.version}) and set TCA_SDIST=/path/to/{pin.sdist}.")
    if "No module named pip" in text:
        raise UpstreamError(f"{sys.executable} has no pip, which downloads the pinned source. "
                            f"Install it ({sys.executable} -m ensurepip, or apt install python3-pip). {offline}")
    if "No module named 'scikit_build_core" in text or "Cannot import 'scikit_build_core" in text:
        raise UpstreamError(f"{sys.executable} has no scikit-build-core, which pip needs to read the pinned source. "
                            f"Install it with: {sys.executable} -m pip install scikit-build-core")
    raise UpstreamError(f"pip could not download {pin.package} {pin.version} (its output: {log}). "
                        f"Check the network and pip's package index, then build again. {offline}")


def unpack(sdist: Path, folder: Path) -> None:
    """Unpacks the files that KEEP names, without the sdist's top folder. Links and odd paths are left out."""
    keep = re.compile("|".join(f"(?:{pattern})" for pattern in KEEP))
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts[1:]
                if not member.isfile() or ".." in parts or not keep.fullmatch("/".join(parts)):
                    continue
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.extractfile(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (tarfile.TarError, EOFError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UpstreamError(f"{sdist} cannot be unpacked ({reason}). Delete it and build again.") from None
    for needed in ("llama_cpp/__init__.py", f"{LLAMA}/CMakeLists.txt", f"{LLAMA}/ggml/CMakeLists.txt"):
        if not (folder / needed).is_file():
            raise UpstreamError(f"{sdist} holds no {needed}: upstream's layout changed. Adapt KEEP in native/scripts/upstream.py.")


# ---- the patch series ------------------------------------------------------------------------------------------------


def patched_files(patches: list[Path]) -> list[str]:
    """Paths, relative to the llama.cpp root, that the series changes or adds."""
    names = []
    for patch in patches:
        for line in patch.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\+\+\+ b/(\S+)", line):
                names.append(match[1])
    return sorted(set(names))


def patch_stat(patches: list[Path]) -> tuple[int, int, int]:
    """(files, lines added, lines deleted) of the series, counted inside hunks only."""
    added = deleted = 0
    for patch in patches:
        old = new = 0  # lines of the present hunk still to come
        for line in patch.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
                old, new = (int(count) if count is not None else 1 for count in match.groups())
            elif old > 0 or new > 0:
                added += line.startswith("+")
                deleted += line.startswith("-")
                old -= not line.startswith(("+", "\\"))
                new -= not line.startswith(("-", "\\"))
    return len(patched_files(patches)), added, deleted


def apply_series(root: Path, patches: list[Path]) -> None:
    """Applies the whole series to `root` in one call, exactly (no fuzz). The caller throws `root` away on failure."""
    git, patch_tool = shutil.which("git"), shutil.which("patch")
    # Inside another checkout `git apply` takes paths relative to that checkout, applies nothing and returns 0. The
    # ceiling makes it see a plain folder; the other variables would point it at a repository (inside a git hook).
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")}
    environment["GIT_CEILING_DIRECTORIES"] = str(root.resolve().parent)
    if git:
        commands = [[git, "apply", "--whitespace=nowarn", "-p1", *map(str, patches)]]
    elif patch_tool:
        commands = [[patch_tool, "-p1", "--batch", "--forward", "-F0", "-i", str(patch)] for patch in patches]
    else:
        raise UpstreamError("Neither git nor patch is installed, and one of them is needed to patch llama.cpp. "
                            "Install one: apt install git")
    for command in commands:
        result = subprocess.run(command, cwd=root, env=environment, text=True, errors="replace",
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if result.returncode != 0:
            first = next((line.strip() for line in result.stdout.splitlines() if line.strip()), "no output")
            raise UpstreamError(f"The patch series in native/patches does not apply to the pinned llama.cpp: {first}. "
                                f"If you changed native/upstream.toml or a patch, redo the series (native/README.md); "
                                f"otherwise restore it with: git checkout native")


def digests(root: Path, names: list[str]) -> dict[str, str | None]:
    return {name: sha256_of(root / name) if (root / name).is_file() else None for name in names}


def check_series(root: Path, names: list[str], before: dict[str, str | None]) -> None:
    """Every patched file must differ from upstream's and carry the marker: a no-op apply cannot pass."""
    for name in names:
        path = root / name
        if not path.is_file() or before[name] == sha256_of(path) or MARKER not in path.read_bytes():
            raise UpstreamError(f"The patch series was applied, yet {name} is unchanged or does not contain "
                                f"'{MARKER.decode()}'. Every patched file must name what it calls; see native/README.md.")


# ---- the tree --------------------------------------------------------------------------------------------------------


def make_tree(pin: Pin, patches: list[Path], local: str | None, cache: Path) -> Path:
    """`<cache>/<version>-<hash>`, complete or absent: it is built beside and renamed."""
    tree = cache / f"{pin.version}-{series_hash(pin, patches)}"
    if tree.is_dir():
        return tree
    sdist = find_sdist(pin, local, cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as folder:
        fresh = Path(folder) / "tree"
        unpack(sdist, fresh)
        llama, names = fresh / LLAMA, patched_files(patches)
        before = digests(llama, names)
        apply_series(llama, patches)
        check_series(llama, names, before)
        try:
            os.rename(fresh, tree)
        except OSError:
            if not tree.is_dir():  # else another build was faster, and its tree is the same
                raise
    for old in cache.glob(f"{pin.version}-*"):
        if old != tree:
            shutil.rmtree(old, ignore_errors=True)
    return tree


def mirror(source: Path, target: Path) -> int:
    """Makes `target` equal to `source`, touching only files that differ. Returns how many were written or removed."""
    changed = 0
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for name in sorted(wanted):
        content = (source / name).read_bytes()
        path = target / name
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_bytes(content)
        os.replace(partial, path)
        changed += 1
    for path in list(target.rglob("*")):
        if path.is_file() and path.relative_to(target) not in wanted:
            path.unlink(missing_ok=True)
            changed += 1
    return changed


def prepare(pin_file: Path, patch_folder: Path, cache: Path, local: str | None) -> tuple[Pin, str, Path]:
    """The pin, the hash of the series and the folder of the patched sdist."""
    pin, patches = read_pin(pin_file), patch_series(patch_folder)
    if not patches:
        raise UpstreamError(f"{patch_folder} holds no patch, and an unpatched llama.cpp cannot use head budgets. "
                            f"Restore the series with: git checkout native/patches")
    cache.mkdir(parents=True, exist_ok=True)
    source = cache / "source"
    mirror(make_tree(pin, patches, local, cache), source)
    return pin, series_hash(pin, patches), source


def write_cmake(path: Path, pin: Pin, patch_hash: str, source: Path | None) -> None:
    """The pin as CMake variables, for the top-level CMakeLists.txt."""
    values = {
        "TCA_UPSTREAM": f"{pin.package} {pin.version}",
        "TCA_UPSTREAM_VERSION": pin.version,
        "TCA_UPSTREAM_COMMIT": pin.llama_cpp_commit,
        "TCA_PATCH_HASH": patch_hash,
    }
    if source is not None:
        values["TCA_LAYER_DIR"] = source.resolve().as_posix()
        values["TCA_LLAMA_DIR"] = (source / LLAMA).resolve().as_posix()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'set({name} "{value}")\n' for name, value in values.items()), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pin", type=Path, default=ROOT / "native" / "upstream.toml")
    parser.add_argument("--patches", type=Path, default=ROOT / "native" / "patches")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("prepare", help="make the patched tree")
    step.add_argument("--cache", type=Path, required=True, help="folder for the sdist and the trees")
    step.add_argument("--cmake", type=Path, required=True, help="file to write the CMake variables to")
    step.add_argument("--sdist", default=os.environ.get("TCA_SDIST"), help="local sdist, for a build without a network")
    only = commands.add_parser("pin", help="write the CMake variables alone, for a build from a tree given by hand")
    only.add_argument("--cmake", type=Path, required=True)
    commands.add_parser("stat", help="print the lines that the series adds and deletes")
    options = parser.parse_args(arguments)
    try:
        if options.command == "stat":
            files, added, deleted = patch_stat(patch_series(options.patches))
            print(f"patch series: {files} upstream files, {added} lines added, {deleted} lines deleted")
        elif options.command == "pin":
            pin = read_pin(options.pin)
            write_cmake(options.cmake, pin, series_hash(pin, patch_series(options.patches)), None)
        else:
            pin, patch_hash, source = prepare(options.pin, options.patches, options.cache, options.sdist)
            write_cmake(options.cmake, pin, patch_hash, source)
    except UpstreamError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or options.command}: {error.strerror or error}. Check the free space and permissions of that path.",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
