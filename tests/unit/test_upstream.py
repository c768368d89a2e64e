"""The source step (native/scripts/upstream.py) on small sdists made here: every failure has its message, nothing stale passes."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "native" / "scripts" / "upstream.py"

spec = importlib.util.spec_from_file_location("tca_upstream_step", SCRIPT)
upstream = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = upstream
spec.loader.exec_module(upstream)

GRAPH = "".join(f"line {i}\n" for i in range(20))
FILES = {
    "LICENSE.md": "MIT",
    "llama_cpp/__init__.py": '__version__ = "9.9.9"\n',
    "llama_cpp/server/app.py": "app = 1\n",
    "vendor/llama.cpp/CMakeLists.txt": "project(llama.cpp)\n",
    "vendor/llama.cpp/LICENSE": "MIT",
    "vendor/llama.cpp/ggml/CMakeLists.txt": "project(ggml)\n",
    "vendor/llama.cpp/src/graph.cpp": GRAPH,
    "vendor/llama.cpp/src/other.cpp": "int other;\n",
    "vendor/llama.cpp/models/big.gguf": "not needed",
    "vendor/llama.cpp/tools/ui/app.ts": "not needed",
    "vendor/llama.cpp/tools/ui/CMakeLists.txt": "",
    "vendor/llama.cpp/tools/server/main.cpp": "int main() {}\n",
}
PATCH = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
Subject: [PATCH] tca: a call

---
diff --git a/src/graph.cpp b/src/graph.cpp
--- a/src/graph.cpp
+++ b/src/graph.cpp
@@ -3,4 +3,5 @@
 line 2
 line 3
+tca_call();
 line 4
 line 5
--
2.39.5
"""
PATCHED = GRAPH.replace("line 3\n", "line 3\ntca_call();\n")


def write_sdist(path: Path, files: dict[str, str]) -> str:
    """Writes a .tar.gz of `files` under the usual top folder and returns its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-9.9.9/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Step:
    """A pin, a patch series, a cache and an sdist of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sdist, self.pin = folder / "llama_cpp_python-9.9.9.tar.gz", folder / "upstream.toml"
        self.patches, self.cache = folder / "patches", folder / "cache"
        self.patches.mkdir()
        self.patch(PATCH)
        self.write(FILES)

    def write(self, files: dict[str, str], sha256: str | None = None) -> None:
        digest = write_sdist(self.sdist, files)
        self.pin.write_text(
            f'package = "llama-cpp-python"\nversion = "9.9.9"\nsdist = "{self.sdist.name}"\n'
            f'sha256 = "{sha256 or digest}"\nllama_cpp_commit = "abc"\nggml_version = "1.2.3"\n'
        )

    def patch(self, text: str, name: str = "0001-call.patch") -> None:
        (self.patches / name).write_text(text)

    def run(self, sdist: Path | str | None = "own") -> Path:
        """The patched llama.cpp folder."""
        local = str(self.sdist) if sdist == "own" else sdist and str(sdist)
        return upstream.prepare(self.pin, self.patches, self.cache, local)[2] / "vendor/llama.cpp"


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step(tmp_path)


def test_patches_and_unpacks_what_the_build_needs(step: Step) -> None:
    llama = step.run()
    assert (llama / "src/graph.cpp").read_text() == PATCHED
    assert (llama / "src/other.cpp").read_text() == FILES["vendor/llama.cpp/src/other.cpp"]
    assert (llama / "tools/server/main.cpp").is_file() and (llama / "tools/ui/CMakeLists.txt").is_file()
    assert not (llama / "models").exists() and not (llama / "tools/ui/app.ts").exists()
    assert (llama.parents[1] / "llama_cpp/server/app.py").is_file() and (llama.parents[1] / "LICENSE.md").is_file()


def test_the_tree_is_named_by_version_and_series(step: Step) -> None:
    step.run()
    pin = upstream.read_pin(step.pin)
    digest = upstream.series_hash(pin, upstream.patch_series(step.patches))
    assert (step.cache / f"9.9.9-{digest}").is_dir() and len(digest) == 12
    step.run()
    assert [entry.name for entry in step.cache.glob("9.9.9-*")] == [f"9.9.9-{digest}"]
    assert not list(step.cache.glob("unpack-*"))


def test_an_edited_patch_is_seen_and_touches_only_its_file(step: Step) -> None:
    llama = step.run()
    before = {path: path.stat().st_mtime_ns for path in llama.rglob("*") if path.is_file()}
    step.patch(PATCH.replace("tca_call", "tca_other_call"))
    assert step.run() == llama
    assert (llama / "src/graph.cpp").read_text() == PATCHED.replace("tca_call", "tca_other_call")
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["graph.cpp"]
    assert len(list(step.cache.glob("9.9.9-*"))) == 1, "the tree of the old series is gone"


def test_a_tree_changed_by_hand_is_put_right(step: Step) -> None:
    llama = step.run()
    (llama / "src/graph.cpp").write_text("edited")
    (llama / "src/new.cpp").write_text("left over")
    step.run()
    assert (llama / "src/graph.cpp").read_text() == PATCHED and not (llama / "src/new.cpp").exists()


def test_a_second_patch_may_build_on_the_first(step: Step) -> None:
    step.patch(PATCH.replace(" line 3\n+tca_call();\n", " line 3\n+// tca: second\n tca_call();\n")
               .replace("@@ -3,4 +3,5 @@", "@@ -3,5 +3,6 @@"), "0002-second.patch")
    assert (step.run() / "src/graph.cpp").read_text() == GRAPH.replace("line 3\n", "line 3\n// tca: second\ntca_call();\n")


def test_the_series_applies_inside_another_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # there, plain `git apply` returns 0 and changes nothing
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert (Step(tmp_path).run() / "src/graph.cpp").read_text() == PATCHED


def test_patch_serves_where_git_is_missing(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = shutil.which("patch")
    if tool is None:
        pytest.skip("patch is not installed")
    monkeypatch.setattr(upstream.shutil, "which", lambda name: tool if name == "patch" else None)
    assert (step.run() / "src/graph.cpp").read_text() == PATCHED
    step.patch(PATCH.replace(" line 4", " line X"))
    with pytest.raises(upstream.UpstreamError, match="does not apply"):
        step.run()


def test_a_local_sdist_may_be_a_folder_and_needs_no_network(step: Step, no_index: None) -> None:
    assert (step.run(step.folder) / "src/graph.cpp").read_text() == PATCHED


def test_a_cached_sdist_needs_no_network(step: Step, no_index: None) -> None:
    step.cache.mkdir()
    shutil.copy(step.sdist, step.cache)
    assert (step.run(None) / "src/graph.cpp").read_text() == PATCHED


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """pip that finds nothing, whatever the machine is set to."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path_factory.mktemp("empty")))


def has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


@pytest.mark.skipif(not has_pip(), reason="this Python has no pip")
def test_pip_downloads_the_sdist(step: Step, no_index: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ("def prepare_metadata_for_build_wheel(folder, settings=None):\n"
               "    import os\n"
               "    os.mkdir(os.path.join(folder, 'llama_cpp_python-9.9.9.dist-info'))\n"
               "    with open(os.path.join(folder, 'llama_cpp_python-9.9.9.dist-info', 'METADATA'), 'w') as f:\n"
               "        f.write('Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 9.9.9\\n')\n"
               "    return 'llama_cpp_python-9.9.9.dist-info'\n")
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    step.write({**FILES, "backend.py": backend, "pyproject.toml": project, "PKG-INFO": "Metadata-Version: 2.1\n"})
    index = step.folder / "index"
    index.mkdir()
    shutil.move(step.sdist, index)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert (step.run(None) / "src/graph.cpp").read_text() == PATCHED
    assert (step.cache / step.sdist.name).is_file() and not list(step.cache.glob("download-*"))


# ---- failures: one paragraph that says what to do ----------------------------------------------------------------------


def fails(step: Step, *words: str, sdist: Path | str | None = "own") -> str:
    with pytest.raises(upstream.UpstreamError) as caught:
        step.run(sdist)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert not list(step.cache.glob("9.9.9-*")), "nothing half-made is left"
    return text


def test_wrong_hash(step: Step) -> None:
    step.write(FILES, sha256="0" * 64)
    fails(step, str(step.sdist), "sha256", "0" * 64, "Delete that file")


def test_a_truncated_sdist_in_the_cache_is_downloaded_anew(step: Step, no_index: None) -> None:
    step.cache.mkdir()
    (step.cache / step.sdist.name).write_bytes(step.sdist.read_bytes()[:100])
    fails(step, "could not download", sdist=None)


def test_missing_sdist(step: Step) -> None:
    fails(step, "TCA_SDIST", "/nowhere/x.tar.gz", step.sdist.name, sdist="/nowhere/x.tar.gz")


@pytest.mark.skipif(not has_pip(), reason="this Python has no pip")
def test_unreachable_index(step: Step, no_index: None) -> None:
    text = fails(step, "could not download llama-cpp-python 9.9.9", "Check the network", "TCA_SDIST=", sdist=None)
    log = step.cache / "pip-download.log"
    assert str(log) in text and "No matching distribution" in log.read_text()


def test_no_pip(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = step.folder / "python"
    fake.write_text(f"#!/bin/sh\necho '{fake}: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(upstream.sys, "executable", str(fake))
    fails(step, "has no pip", "ensurepip", sdist=None)


def test_a_patch_that_does_not_apply(step: Step) -> None:
    step.patch(PATCH.replace(" line 4", " line four"))
    fails(step, "does not apply", "src/graph.cpp", "git checkout native")


def test_the_series_is_atomic(step: Step) -> None:
    step.patch(PATCH.replace("graph.cpp", "missing.cpp"), "0002-missing.patch")
    fails(step, "does not apply", "src/missing.cpp")


def test_a_patched_file_without_our_marker(step: Step) -> None:
    step.patch(PATCH.replace("tca_call", "call"))
    fails(step, "src/graph.cpp", "does not contain 'tca'")


def test_a_patch_that_changes_nothing(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "apply_series", lambda root, patches: None)  # a tool that says yes and does nothing
    fails(step, "src/graph.cpp is unchanged")


def test_no_patches(step: Step) -> None:
    (step.patches / "0001-call.patch").unlink()
    fails(step, "holds no patch", "git checkout native/patches")


def test_neither_git_nor_patch(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.shutil, "which", lambda name: None)
    fails(step, "Neither git nor patch", "apt install git")


def test_another_layout(step: Step) -> None:
    step.write({name: text for name, text in FILES.items() if "ggml" not in name})
    fails(step, "ggml/CMakeLists.txt", "KEEP")


def test_not_an_archive(step: Step) -> None:
    step.sdist.write_bytes(b"hello")
    step.pin.write_text(step.pin.read_text().replace(upstream.read_pin(step.pin).sha256, hashlib.sha256(b"hello").hexdigest()))
    fails(step, "cannot be unpacked")


def test_links_and_paths_outside_are_not_unpacked(step: Step) -> None:
    with tarfile.open(step.sdist, "w:gz") as archive:
        for name, text in {**FILES, "llama_cpp/../../../evil.py": "evil"}.items():
            member = tarfile.TarInfo(f"llama_cpp_python-9.9.9/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("llama_cpp_python-9.9.9/llama_cpp/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    digest = hashlib.sha256(step.sdist.read_bytes()).hexdigest()
    step.pin.write_text(step.pin.read_text().replace(upstream.read_pin(step.pin).sha256, digest))
    llama = step.run()
    assert not (llama.parents[1] / "llama_cpp/link.py").exists()
    assert not list(step.folder.parent.rglob("evil.py"))


def test_the_command_line_prints_the_message_alone(step: Step, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pin", str(step.pin), "--patches", str(step.patches), "prepare", "--cache", str(step.cache),
                 "--cmake", str(step.folder / "pin.cmake"), "--sdist"]
    assert upstream.main([*arguments, "/nowhere"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("TCA_SDIST: ") and err.count("\n") == 1
    assert upstream.main([*arguments, str(step.sdist)]) == 0
    text = (step.folder / "pin.cmake").read_text()
    assert 'set(TCA_UPSTREAM "llama-cpp-python 9.9.9")' in text and "vendor/llama.cpp" in text


# ---- the repository's own pin and series -------------------------------------------------------------------------------


def test_stat_counts_hunk_lines_only(step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    assert upstream.patch_stat(upstream.patch_series(step.patches)) == (1, 1, 0)
    step.patch(PATCH.replace(" line 3\n", "---line 3\n+++line 3\n"))  # look like file headers, are lines of a hunk
    assert upstream.patch_stat(upstream.patch_series(step.patches)) == (1, 2, 1)


def test_the_series_of_this_repository() -> None:
    patches = upstream.patch_series(ROOT / "native" / "patches")
    files, added, deleted = upstream.patch_stat(patches)
    assert patches and files > 0
    assert deleted == 0, "the series adds calls; it deletes no upstream line"
    assert added <= 150, "bodies belong into native/"
    pin = upstream.read_pin(ROOT / "native" / "upstream.toml")
    for patch in patches:
        text = patch.read_text()
        assert text.startswith("From 0000000000000000000000000000000000000000 "), f"{patch.name}: git format-patch --zero-commit"
        assert pin.llama_cpp_commit in text, f"{patch.name}: name the llama.cpp commit it was made against"


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="cmake and ninja are not on the path")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-DTCA_SDIST=/nowhere/x.tar.gz"], "TCA_SDIST: there is no file /nowhere/x.tar.gz"),
        (["-DGGML_BACKEND_DL=ON", "-DTCA_BUILD_TESTS=ON"], "TCA_BUILD_TESTS=ON needs backends that are linked"),
        (["-DBUILD_SHARED_LIBS=OFF"], "BUILD_SHARED_LIBS=OFF is not supported"),
        (["-DTCA_LLAMA_DIR=/nowhere"], "/nowhere is not a llama.cpp tree"),
    ],
)
def test_cmake_ends_with_one_message(options: list[str], words: str, tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DTCA_BUILD_BINDING=OFF",
               f"-DTCA_CACHE_DIR={tmp_path / 'cache'}", f"-DPython_EXECUTABLE={sys.executable}", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert " ".join(result.stderr.split()).count("tca-gguf: ") == 1
    assert words in " ".join(result.stderr.split())


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="cmake and ninja are not on the path")
def test_cmake_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"  # a machine that has these two programs and no other
    tools.mkdir()
    for name in ("cmake", "ninja"):
        (tools / name).symlink_to(Path(shutil.which(name)).resolve())
    command = [str(tools / "cmake"), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    monkeypatch.setenv("PATH", str(tools))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    text = " ".join(result.stderr.split())
    assert text.count("tca-gguf: ") == 1 and "apt install g++" in text


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="cmake and ninja are not on the path")
def test_every_cpu_variant_gets_the_kernels(tmp_path: Path) -> None:
    """Configured, not built: with backends that are loaded at run time each variant that was asked for has all of our files."""
    tree = ROOT / "build/upstream/source/vendor/llama.cpp"
    if not tree.is_dir() or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("no upstream source here, or other variants")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DTCA_BUILD_BINDING=OFF", "-DTCA_BUILD_PROGRAMS=OFF",
               f"-DTCA_LLAMA_DIR={tree}", f"-DPython_EXECUTABLE={sys.executable}", "-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON",
               "-DGGML_CPU_ALL_VARIANTS=ON", "-DTCA_CPU_VARIANTS=x64;haswell"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    objects = [line.split(":")[0] for line in (tmp_path / "build.ninja").read_text().splitlines() if line.startswith("build ")]
    variants = {match[1] for name in objects if (match := re.search(r"CMakeFiles/ggml-cpu-(\w+)\.dir/", name))}
    assert variants == {"x64", "haswell"}
    ours = [path.name for path in (ROOT / "native/cpu").glob("*.cpp")]
    for variant in variants:
        for file in ours:
            assert any(f"ggml-cpu-{variant}.dir/" in name and name.endswith(f"/native/cpu/{file}.o") for name in objects), (variant, file)
    assert not any("CMakeFiles/ggml-cpu.dir" in name for name in objects)  # libllama links none
