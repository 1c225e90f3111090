"""The build: how llama.cpp's source is obtained and patched, and what is installed. Compiles nothing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from llama_cpp._ctypes_extensions import load_shared_library

import fetch_llama_cpp as fetch
from _pydeltamem_startup import LLAMA_CPP_VERSION
from conftest import ROOT
from refusals import check_names, refuses

SCRIPT = ROOT / "cmake" / "fetch_llama_cpp.py"

# a miniature llama.cpp: what the script looks for, a file that the patch changes, and one that it does not
FILES = {
    "CMakeLists.txt": "project(llama)\n",
    "ggml/CMakeLists.txt": "project(ggml)\n",
    "src/llama-graph.cpp": "one\ntwo\nthree\n",
    "src/llama-model.cpp": "model\n",
    "docs/long.md": "not part of the build\n",
}

PATCH = """\
--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -1,0 +2 @@
+hook
@@ -3 +4 @@
-three
+THREE
"""
PATCHED = "one\nhook\ntwo\nTHREE\n"
OLD = 1_000_000_000  # a modification time in the past


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def sdist(tmp_path, source):
    """A source distribution as pip sees one, with a build backend of its own that needs nothing installed."""
    top = f"llama_cpp_python-{fetch.VERSION}"
    package = tmp_path / top
    shutil.copytree(source, package / "vendor" / "llama.cpp")
    metadata = f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {fetch.VERSION}\n"
    (package / "PKG-INFO").write_text(metadata)
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (package / "backend.py").write_text(
        "import pathlib\n"
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        f"    info = pathlib.Path(folder, 'llama_cpp_python-{fetch.VERSION}.dist-info')\n"
        "    info.mkdir()\n"
        f"    (info / 'METADATA').write_text({metadata!r})\n"
        "    return info.name\n"
        "def build_wheel(*args):\n"
        "    raise AssertionError('nothing is to be built')\n"
    )
    archive = tmp_path / "index" / fetch.SDIST
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package, arcname=top)
    return archive


@pytest.fixture
def patch(tmp_path):
    path = tmp_path / "patches" / "0001-hook.patch"
    path.parent.mkdir()
    path.write_text(PATCH)
    return path


@pytest.fixture
def tree(tmp_path):
    return tmp_path / "build" / "llama.cpp"


def prepare(tree, patches, archive):
    return fetch.prepare(tree, patches, tree.parent / "download", archive, fetch.sha256_of(archive))


def age(tree):
    for path in tree.rglob("*"):
        os.utime(path, (OLD, OLD))


def touched(tree):
    return {
        path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file() and path.stat().st_mtime != OLD
    }


def test_source_is_unpacked_and_patched(tree, patch, sdist):
    prepare(tree, [patch], sdist)
    assert (tree / "src/llama-graph.cpp").read_text() == PATCHED
    assert (tree / "src/llama-model.cpp").read_text() == FILES["src/llama-model.cpp"]
    assert not (tree / "docs").exists()


def test_nothing_changed_touches_nothing(tree, patch, sdist):
    prepare(tree, [patch], sdist)
    age(tree)
    assert prepare(tree, [patch], sdist) == []
    assert touched(tree) == set()


def test_changed_patch_touches_only_its_files(tree, patch, sdist):
    prepare(tree, [patch], sdist)
    age(tree)
    patch.write_text(PATCH.replace("+hook", "+other"))
    assert prepare(tree, [patch], sdist) == [Path("src/llama-graph.cpp")]
    assert touched(tree) == {"src/llama-graph.cpp", fetch.STAMP}
    assert (tree / "src/llama-graph.cpp").read_text() == PATCHED.replace("hook", "other")


def test_removed_patch_is_taken_back(tree, patch, sdist):
    prepare(tree, [patch], sdist)
    prepare(tree, [], sdist)
    assert (tree / "src/llama-graph.cpp").read_text() == FILES["src/llama-graph.cpp"]


def test_patch_may_add_and_remove_files(tree, patch, sdist):
    added = patch.with_name("0002-new.patch")
    added.write_text("--- /dev/null\n+++ b/src/new.cpp\n@@ -0,0 +1 @@\n+new\n")
    prepare(tree, [patch, added], sdist)
    assert (tree / "src/new.cpp").read_text() == "new\n"
    prepare(tree, [patch], sdist)
    assert not (tree / "src/new.cpp").exists()


def test_named_tree_is_copied_not_changed(tree, patch, source):
    fetch.prepare(tree, [patch], tree.parent / "download", source)
    assert (tree / "src/llama-graph.cpp").read_text() == PATCHED
    assert (source / "src/llama-graph.cpp").read_text() == FILES["src/llama-graph.cpp"]
    age(tree)
    fetch.prepare(tree, [patch], tree.parent / "download", source)
    assert touched(tree) == set()


def test_patch_applies_inside_an_ignored_folder_of_a_repository(tree, patch, sdist):
    # by default git apply skips every file there and reports success
    repository = tree.parent.parent
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    (repository / ".gitignore").write_text("build\n")
    prepare(tree, [patch], sdist)
    assert (tree / "src/llama-graph.cpp").read_text() == PATCHED


def test_patch_that_does_not_apply(tree, patch, sdist, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")  # git says it in German, where it has that
    prepare(tree, [patch], sdist)
    patch.write_text(PATCH.replace("-three", "-four"))
    with refuses(fetch.FetchError, "0001-hook.patch", "src/llama-graph.cpp"):
        prepare(tree, [patch], sdist)
    assert (tree / "src/llama-graph.cpp").read_text() == PATCHED, "the tree that was built stays"


def test_patch_made_for_another_version_is_noticed(tree, patch, source):
    before = fetch.blob_id(source / "src/llama-graph.cpp")
    after = fetch.hashlib.sha1(b"blob %d\0" % len(PATCHED) + PATCHED.encode()).hexdigest()
    header = f"diff --git a/src/llama-graph.cpp b/src/llama-graph.cpp\nindex {before[:9]}..{after[:9]} 100644\n"
    patch.write_text(header + PATCH)
    fetch.prepare(tree, [patch], tree.parent / "download", source)

    # one more line at the top: hunks without context would go to the wrong place
    (source / "src/llama-graph.cpp").write_text("zero\n" + FILES["src/llama-graph.cpp"].replace("two\n", ""))
    with refuses(fetch.FetchError, patch.name, "src/llama-graph.cpp"):
        fetch.prepare(tree, [patch], tree.parent / "download", source)


def test_wrong_checksum(tree, patch, sdist):
    with refuses(fetch.FetchError, sdist, fetch.sha256_of(sdist), fetch.SHA256):
        fetch.prepare(tree, [patch], tree.parent / "download", sdist)
    assert not tree.exists()


def test_missing_source(tree, patch, tmp_path):
    with refuses(fetch.FetchError, tmp_path / "nowhere"):
        fetch.prepare(tree, [patch], tree.parent / "download", tmp_path / "nowhere")


def test_source_that_is_no_llama_cpp(tree, patch, tmp_path):
    with refuses(fetch.FetchError, tmp_path, "ggml/CMakeLists.txt"):
        fetch.prepare(tree, [patch], tree.parent / "download", tmp_path)


def test_pip_obtains_the_source_by_name(tmp_path, sdist, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    archive = fetch.download(tmp_path / "download", fetch.sha256_of(sdist))
    assert archive.read_bytes() == sdist.read_bytes()

    # kept, and checked again when it is used
    sdist.unlink()
    assert fetch.download(tmp_path / "download", fetch.sha256_of(archive)) == archive
    archive.write_bytes(b"damaged")
    with refuses(fetch.FetchError, archive, fetch.sha256_of(archive), fetch.SHA256):
        fetch.download(tmp_path / "download")


def test_downloaded_source_with_another_checksum_is_not_kept(tmp_path, sdist, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with refuses(fetch.FetchError, fetch.sha256_of(sdist), fetch.SHA256):
        fetch.download(tmp_path / "download")
    assert list((tmp_path / "download").iterdir()) == []


def test_a_release_without_a_known_checksum(tmp_path, sdist, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    archive = fetch.download(tmp_path / "download", None, fetch.VERSION)
    assert archive.read_bytes() == sdist.read_bytes()
    sdist.unlink()
    assert fetch.download(tmp_path / "download", None, fetch.VERSION) == archive
    with refuses(fetch.FetchError, "llama-cpp-python==9.8.7"):
        fetch.download(tmp_path / "download", None, "9.8.7")


def test_pip_that_finds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with refuses(fetch.FetchError, fetch.REQUIREMENT, fetch.SDIST, tmp_path / "download"):
        fetch.download(tmp_path / "download")


def configure(tmp_path, *options, **environment):
    """Runs CMake on the project; returns the message of its error as one line."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "cmake", f"-DPython_EXECUTABLE={sys.executable}", *options]
    variables = {key: value for key, value in os.environ.items() if key != "DELTAMEM_LLAMA_CPP_SOURCE"}
    result = subprocess.run(command, capture_output=True, text=True, env={**variables, **environment})
    assert result.returncode != 0
    head, _, message = result.stderr.partition("(message):")
    assert head.startswith("CMake Error at CMakeLists.txt")
    return " ".join(message.split())


def test_cmake_stops_with_one_sentence_for_a_wrong_checksum(tmp_path, sdist):
    message = configure(tmp_path, f"-DDELTAMEM_LLAMA_CPP_SOURCE={sdist}")
    check_names(message, [sdist, fetch.sha256_of(sdist)])
    assert message.count(". ") == 0


def test_cmake_stops_with_one_sentence_for_a_patch_that_does_not_apply(tmp_path, source):
    message = configure(tmp_path, f"-DDELTAMEM_LLAMA_CPP_SOURCE={source}")
    first = sorted((ROOT / "native" / "patches").glob("*.patch"))[0]
    check_names(message, [first.name])
    assert message.count(". ") == 0


def test_cmake_asks_the_environment_for_the_source_each_time(tmp_path, source, sdist):
    """make builds in the same folder again, and a source that was refused may be corrected there, or unset."""
    check_names(configure(tmp_path, DELTAMEM_LLAMA_CPP_SOURCE="/nowhere"), ["/nowhere"])
    check_names(configure(tmp_path, DELTAMEM_LLAMA_CPP_SOURCE=str(sdist)), [sdist])
    below = os.path.relpath(sdist, ROOT)
    check_names(configure(tmp_path, DELTAMEM_LLAMA_CPP_SOURCE=below), [sdist])
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}
    check_names(configure(tmp_path, **offline), [fetch.REQUIREMENT])
    named = f"-DDELTAMEM_LLAMA_CPP_SOURCE={source}"
    check_names(configure(tmp_path, named, **offline, DELTAMEM_LLAMA_CPP_SOURCE=""), [fetch.REQUIREMENT])


#
# the source distribution
#


def test_the_source_distribution_has_nothing_that_git_ignores(tmp_path):
    clone = tmp_path / "clone"
    names = {
        ".gitignore",
        "LICENSE",
        "README.md",
        "licenses/LICENSE-llama.cpp",
        "pydeltamem/version.py",
        "pyproject.toml",
    }
    for name in names:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    for name in (".venv/lib/pyproject.toml", "build/native/pyproject.toml", "pydeltamem/lib/libllama.so"):
        (clone / name).parent.mkdir(parents=True)
        (clone / name).touch()
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=clone, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    assert packed == names | {"PKG-INFO"}


#
# what is installed
#


@pytest.fixture(scope="module")
def package():
    return Path(importlib.util.find_spec("pydeltamem").origin).parent


@pytest.fixture(scope="module")
def libraries(package):
    return sorted(path for path in (package / "lib").iterdir() if path.is_file())


def test_every_library_is_there_once(libraries):
    names = [path.name.split(".")[0] for path in libraries]
    stems = [name[3:] if name.startswith("lib") else name for name in names]
    assert {"llama", "ggml", "ggml-base"} <= set(stems)
    assert any(stem.startswith("ggml-cpu") for stem in stems)
    assert len(stems) == len(set(stems))
    assert not any(path.is_symlink() for path in libraries)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs Linux and readelf")
def test_libraries_find_each_other_by_their_own_folder(libraries):
    for path in libraries:
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        values = re.findall(r"\((\w+)\).*\[(.*)\]", dynamic)
        rpath = ":".join(value for tag, value in values if tag in ("RPATH", "RUNPATH")).split(":")
        assert rpath[0] == "$ORIGIN"
        assert not any(folder.startswith(str(ROOT)) for folder in rpath)
        ours = [value for tag, value in values if tag == "NEEDED" and value.startswith(("libggml", "libllama"))]
        assert all((path.parent / name).exists() for name in ours)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs Linux and readelf")
def test_nothing_of_ggml_cpu_runs_when_it_is_loaded(libraries):
    """Where a wheel has one for each kind of processor, ggml loads all of them to ask which run here. A constructor of
    one that does not may be an illegal instruction.
    """
    for path in libraries:
        if "ggml-cpu" in path.name:
            sections = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True).stdout
            size = re.search(r"\.init_array +INIT_ARRAY +\w+ \w+ (\w+)", sections)[1]
            assert int(size, 16) == struct.calcsize("P"), path.name  # the compiler's own entry


def test_metadata_and_licences():
    distribution = importlib.metadata.distribution("pydeltamem")
    assert distribution.version == importlib.import_module("pydeltamem").__version__
    assert f"llama-cpp-python=={fetch.VERSION}" in distribution.requires
    assert {(entry.name, entry.value) for entry in distribution.entry_points} == {
        ("deltamem", "pydeltamem.cli.main:main")
    }

    shipped = {path.name: path for path in distribution.files if "licenses" in path.parts}
    for path in [ROOT / "LICENSE", *(ROOT / "licenses").iterdir()]:
        assert shipped[path.name].locate().read_bytes() == path.read_bytes()


def test_package_is_typed_and_has_the_converter(package):
    assert (package / "py.typed").exists()
    assert importlib.util.find_spec("pydeltamem.convert") is not None


def test_one_release_of_llama_cpp_python_is_pinned(package):
    """pyproject.toml names it; what reads it there agrees, and so do the copies (tests/test_upstream.py finds more)."""
    assert f'"llama-cpp-python=={fetch.VERSION}"' in (ROOT / "pyproject.toml").read_text()
    assert fetch.VERSION == LLAMA_CPP_VERSION
    for page in ("docs/how-to/install.md", "docs/tutorial/index.md"):
        assert f"llama-cpp-python=={fetch.VERSION}" in (ROOT / page).read_text(encoding="utf-8")

    ggml = load_shared_library("ggml-base", package / "lib")  # CMake told it
    ggml.ggml_commit.restype = ctypes.c_char_p
    assert ggml.ggml_commit().decode() == f"llama-cpp-python-{fetch.VERSION}"
