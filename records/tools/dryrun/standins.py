"""Builds the pretended H100 from the C files beside it, and starts a Python that sees it.

Two libraries: `dryrun.so`, preloaded, stands in front of cudart, cuBLAS, cuSOLVER, NCCL and cuDNN's
backend; `libcuda.so.1` is the driver. What torch wants from NVIDIA's libraries and the C files do
not define becomes a stub that returns 0. They lie in a cache whose name is a hash of the sources
and of the place of torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple, NoReturn

SOURCES = Path(__file__).resolve().parent / "c"
SITE = Path(sysconfig.get_paths()["purelib"])
# Names that torch's libraries may want from the preloaded one.
RUNTIME = re.compile(r"cuda[A-Z]|__cuda|cublas|cusolver|nccl|cudnn(SetStream|Destroy)$")
DRIVER = re.compile(r"cu[A-Z]")


class Library(NamedTuple):
    """A shared library to build: its C files, and the names that it must have."""

    file: str
    sources: tuple[str, ...]
    wanted: set[str]
    options: tuple[str, ...] = ()


class NoCudaBuild(RuntimeError):
    """This Python's torch is not one for CUDA, or a tool is missing that the build needs."""


def run(command: list[str]) -> str:
    """What a command prints; NoCudaBuild with its complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoCudaBuild(f"{' '.join(command[:3])} failed: {done.stderr[-2000:]}")
    return done.stdout


def undefined(library: Path, pattern: re.Pattern[str]) -> set[str]:
    """The names of functions that a library wants from others."""
    lines = run(["nm", "-D", "--undefined-only", str(library)]).splitlines()
    names = (line.split()[-1].split("@")[0] for line in lines)
    return {name for name in names if pattern.match(name)}


def defined(object_file: Path) -> set[str]:
    return {
        line.split()[-1] for line in run(["nm", "--defined-only", str(object_file)]).splitlines()
    }


def driver_names() -> set[str]:
    """All functions of the driver: Triton and torch look them up by name, at run time."""
    header = (SITE / "triton/backends/nvidia/include/cuda.h").read_text()
    called = re.findall(r"\bcu[A-Z]\w*(?=\()", header)
    renamed = re.findall(r"#define +cu[A-Z]\w+ +(cu[A-Z]\w+)", header)  # to their second versions
    return {*called, *renamed, *undefined(SITE / "torch/lib/libcaffe2_nvrtc.so", DRIVER)}


def libraries() -> list[Library]:
    lib = SITE / "torch/lib"
    users = [
        *lib.glob("lib*cuda*.so"),
        lib / "libtorch_python.so",
        *lib.glob("libtorch_nvshmem.so"),
    ]
    wanted = set().union(*(undefined(user, RUNTIME) for user in users)) | {"cudnnDestroy"}
    sources = tuple(sorted(path.name for path in SOURCES.glob("*.c") if path.name != "driver.c"))
    return [
        Library("dryrun.so", sources, wanted, ("-lpthread",)),
        Library("libcuda.so.1", ("driver.c",), driver_names(), ("-Wl,-soname,libcuda.so.1",)),
    ]


def cache() -> Path:
    """Where the stand-ins lie, and what is compiled for the pretended GPU."""
    return Path(os.environ.get("DRYRUN_HOME") or Path.home() / ".cache/dryrun")


def home() -> Path:
    """Where the stand-ins of these sources and this torch lie."""
    digest = hashlib.sha256(str(SITE).encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return cache() / digest.hexdigest()[:12]


def stubs(names: set[str]) -> str:
    """C source of functions that do nothing."""
    lines = ["extern int dryrun_stub(const char *name, int *calls) __attribute__((weak));"]
    for name in sorted(names):
        call = f'dryrun_stub ? dryrun_stub("{name}", &calls) : 0'
        lines.append(f"int {name}(void) {{ static int calls; return {call}; }}")
    return "\n".join(lines) + "\n"


def build_library(library: Library, folder: Path) -> None:
    includes = [*SITE.glob("nvidia/*/include"), SITE / "triton/backends/nvidia/include", SOURCES]
    compiler = ["gcc", "-std=gnu11", "-O1", "-fPIC", *(f"-I{path}" for path in includes)]
    objects = []
    have: set[str] = set()
    for source in library.sources:
        made = folder / f"{source}.o"
        run([*compiler, "-c", str(SOURCES / source), "-o", str(made)])
        have |= defined(made)
        objects.append(str(made))
    stub_source = folder / f"{library.file}.stubs.c"
    stub_source.write_text(stubs(library.wanted - have))
    # The compiler knows other types for some of these names.
    quiet = ["-fno-builtin", "-w"]
    linked = ["-shared", "-o", str(folder / library.file), *objects, str(stub_source)]
    run([*compiler, *quiet, *linked, "-ldl", *library.options])


def build() -> Path:
    """The folder with the stand-ins, built if they are not there yet."""
    folder = home()
    if folder.exists():
        return folder
    if not (SITE / "torch/lib/libtorch_cuda.so").exists():
        raise NoCudaBuild(f"{sys.executable} has no CUDA build of torch: see README.md")
    for tool in ("gcc", "nm"):
        if not shutil.which(tool):
            raise NoCudaBuild(f"{tool} is not installed")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    for library in libraries():
        build_library(library, unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(unfinished)
    return folder


def environment() -> dict[str, str]:
    """Variables under which a Python sees the pretended GPU.

    What is compiled for it is kept apart from what is compiled for a real one.
    """
    folder = build()
    caches = dict(
        TRITON_CACHE_DIR=str(cache() / "triton"),
        TORCHINDUCTOR_CACHE_DIR=str(cache() / "inductor"),
        TORCHINDUCTOR_COMPILE_THREADS="1",
    )
    stand_ins = dict(
        LD_PRELOAD=str(folder / "dryrun.so"),
        LD_LIBRARY_PATH=str(folder),
        TRITON_LIBCUDA_PATH=str(folder),
    )
    return caches | dict(os.environ) | stand_ins


def inside() -> bool:
    """Whether this process has the stand-ins."""
    return "dryrun.so" in os.environ.get("LD_PRELOAD", "")


def enter(arguments: list[str]) -> NoReturn:
    """This process becomes a Python with these arguments that sees the pretended GPU."""
    os.execvpe(sys.executable, [sys.executable, *arguments], environment())
