"""Builds fusedopt._C, the extension with the kernels.

The extension knows no torch: no torch headers, no torch libraries, and no torch in the build
environment, so one build serves every torch from 2.10 on. Compilation goes through a ninja file:
rebuilding compiles only what changed, on all cores.

Environment:
    CXX, CXXFLAGS, LDFLAGS   the compiler, and flags to add
    FUSEDOPT_CUDA            auto (default): kernels for CUDA when there is an nvcc; 1: stop when
                             there is none; 0: none
    FUSEDOPT_CUDA_ARCHS      for which architectures (default: those of 75,80,90,100,120 that
                             nvcc knows); and as PTX, for later ones
    CUDA_HOME                where CUDA is (default: that of the nvcc on the PATH)
    FUSEDOPT_BUILD_DIR       where object files go (default: build/fusedopt)
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

SOURCES = ("cpu", "cuda_table", "layout", "overlap")
PYTHON_SOURCES = ("bind", "describe", "device", "pytensor", "stepper")

# -ffp-contract=off: fused multiply-adds where rules.h asks for them and nowhere else, so that
# every instruction set rounds alike.
# -fno-math-errno, -fno-trapping-math: let sqrt and selects be vectorized; they leave results,
# nan and inf among them, alone. (-ffast-math would not.)
COMMON = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
X86_KERNELS = {
    "cpu_avx2.cpp": ["-mavx2", "-mfma"],
    "cpu_avx512.cpp": [
        *("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}
# A GPU, too, fuses multiply-adds where rules.h asks for them; its divisions and roots round
# correctly unless one asks for faster ones.
CUDA_KERNEL = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "75,80,90,100,120"  # 86 and 89 run what is made for 80
CUDA_OLDEST = (12, 4)


def sources_digest() -> str:
    """Of all that the extension is made from; the extension has it as ``SOURCES``."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted((ROOT / "csrc").iterdir())]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def find_nvcc() -> str | None:
    """CUDA's compiler: under CUDA_HOME, on the PATH, or where its installer puts it."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which(str(Path(home, "bin", "nvcc")))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def choose_cuda() -> str | None:
    """The nvcc to build with, or None; says which, and exits when FUSEDOPT_CUDA=1 finds none."""
    wanted = os.environ.get("FUSEDOPT_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"fusedopt: FUSEDOPT_CUDA={wanted} is none of auto, 1 and 0.")
    if wanted == "0":
        print("fusedopt: CUDA: no (FUSEDOPT_CUDA=0)")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        found = f"no nvcc (CUDA_HOME={os.environ.get('CUDA_HOME', '')}, or on the PATH)"
    else:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", text)
        if release is not None and (int(release[1]), int(release[2])) >= CUDA_OLDEST:
            print(f"fusedopt: CUDA {release[1]}.{release[2]} ({nvcc}) for {cuda_archs(nvcc)}")
            return nvcc
        found = f"{nvcc} is not of CUDA {CUDA_OLDEST[0]}.{CUDA_OLDEST[1]} or later"
    if wanted == "1":
        sys.exit(f"fusedopt: FUSEDOPT_CUDA=1, but {found}.")
    print(f"fusedopt: CUDA: {found}; kernels for the CPU only")
    return None


def cuda_archs(nvcc: str) -> str:
    """The architectures, as numbers with commas; exits when they are not such."""
    archs = os.environ.get("FUSEDOPT_CUDA_ARCHS")
    if not archs:  # 100 and 120 came with CUDA 12.8
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        return ",".join(n for n in CUDA_ARCHS.split(",") if f"compute_{n}\n" in known)
    if not re.fullmatch(r"\d+[af]?(,\d+[af]?)*", archs):
        sys.exit(f"fusedopt: FUSEDOPT_CUDA_ARCHS={archs} is not like {CUDA_ARCHS}.")
    return archs


def cuda_flags(archs: str) -> list[str]:
    """What nvcc is told beside the files."""
    names = archs.split(",")
    # Most of a compilation is to intermediate code, in which nothing differs from 80 on: one serves
    # all of these. (Those with a letter have instructions that nobody else has, before or after.)
    shared: dict[str, list[str]] = {}
    for name in names:
        base = "80" if name.isdigit() and int(name) >= 80 else name
        shared.setdefault(base, []).append(f"sm_{name}")
        if name == names[-1]:
            shared[base].append(f"compute_{base}")
    targets = [
        f"-gencode=arch=compute_{base},code=[{','.join(codes)}]" for base, codes in shared.items()
    ]
    return [*CUDA_KERNEL, *targets, f'-DFUSEDOPT_CUDA_ARCHS="{archs}"']


def cuda_libraries(nvcc: str) -> list[str]:
    """The static runtime: nothing of CUDA has to be installed where the extension is used."""
    # nvcc may be a link or a script, but knows where it belongs.
    plan = subprocess.run(
        [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, cwd=tempfile.gettempdir()
    ).stderr
    top = re.findall(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    folders = [Path(home, name) for home in top for name in ("lib64", "lib")]
    folders += [Path(folder) for folder in re.findall(r'"-L(.+?)"', plan)]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return [str(folder / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]
    sys.exit(
        f"fusedopt: libcudart_static.a is in none of {', '.join(map(str, folders))}. "
        "(FUSEDOPT_CUDA=0 leaves CUDA away.)"
    )


def find_compiler() -> list[str]:
    """The C++ compiler's command line; exits with one sentence when there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    sys.exit(
        "fusedopt: no C++ compiler found "
        + (f"(CXX={wanted})" if wanted else "(looked for g++, c++ and clang++)")
        + "; install one (Debian and Ubuntu: apt install g++) or set CXX."
    )


def compiles(compiler: list[str], flags: list[str], source: str) -> bool:
    """Whether a program compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler, "-std=c++17", *flags, str(path), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def builds_x86_kernels(compiler: list[str]) -> bool:
    """Whether there are kernels beside "base", for the processor to pick from when loaded."""
    return platform.machine().lower() in ("x86_64", "amd64") and all(
        compiles(compiler, flags, "int main() {}") for flags in X86_KERNELS.values()
    )


def ninja_quote(words: list[str]) -> str:
    """A command line for a ninja file."""
    return shlex.join(words).replace("$", "$$")


class BuildExt(build_ext):
    """Writes build.ninja, runs it, and lets setuptools place the result."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link what changed."""
        compiler = find_compiler()
        if not compiles(compiler, [], "#include <type_traits>\nint main() {}"):
            sys.exit(f"fusedopt: {shlex.join(compiler)} cannot compile C++17.")
        include = sysconfig.get_path("include")
        if not Path(include, "Python.h").exists():
            sys.exit(
                f"fusedopt: Python.h is not in {include}; install Python's headers "
                "(Debian and Ubuntu: apt install python3-dev)."
            )
        folder = Path(os.environ.get("FUSEDOPT_BUILD_DIR", ROOT / "build" / "fusedopt")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(compiler, include, target))
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        if subprocess.run(command).returncode != 0:
            sys.exit(
                "fusedopt: the extension did not compile; the compiler's words are above. "
                "(FUSEDOPT_CUDA=0 leaves CUDA away.)"
            )

    def ninja_file(self, compiler: list[str], include: str, target: Path) -> str:
        """The text of build.ninja."""
        openmp = ["-fopenmp"]
        if not compiles(compiler, openmp, "#include <omp.h>\nint main() { omp_get_thread_num(); }"):
            print("fusedopt: no OpenMP in this compiler; steps will run on one thread.")
            openmp = []
        nvcc = choose_cuda()
        x86 = builds_x86_kernels(compiler)
        print(f"fusedopt: kernels for {'base, avx2, avx512' if x86 else 'base'}")

        kernels = {"cpu_base.cpp": [], **(X86_KERNELS if x86 else {})}
        python = ["-isystem", include, "-isystem", pybind11.get_include()]
        flags = {
            **{f"{name}.cpp": python for name in PYTHON_SOURCES},
            "bind.cpp": [*python, f'-DFUSEDOPT_SOURCES="{sources_digest()}"'],
            **{f"{name}.cpp": [] for name in SOURCES},
            **({} if nvcc else {"no_cuda.cpp": []}),
            **{source: KERNEL + isa for source, isa in kernels.items()},
        }
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        common = COMMON + openmp + (["-DFUSEDOPT_X86"] if x86 else []) + extra
        link = (
            ["-dynamiclib", "-undefined", "dynamic_lookup"]
            if sys.platform == "darwin"
            else ["-shared"]
        )
        link += openmp + (cuda_libraries(nvcc) if nvcc else [])
        link += shlex.split(os.environ.get("LDFLAGS", ""))

        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {ninja_quote(compiler)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            f"rule link\n  command = {ninja_quote(compiler)} $in {ninja_quote(link)} -o $out",
            "  description = link $out",
        ]
        if nvcc:
            # Its own choice is the gcc on the PATH.
            host = [f"-ccbin={compiler[0]}"] if "CXX" in os.environ and len(compiler) == 1 else []
            command = [nvcc, *cuda_flags(cuda_archs(nvcc)), *host, "--threads=0"]
            lines += [
                f"rule cuda\n  command = {ninja_quote(command)} -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc\n  description = compile $in (takes a while)",
            ]

        def path(p: Path) -> str:
            return str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

        objects = [str(Path(source).with_suffix(".o")) for source in flags]
        for source, object_file in zip(flags, objects, strict=True):
            lines.append(f"build {object_file}: compile {path(ROOT / 'csrc' / source)}")
            lines.append(f"  flags = {ninja_quote(common + flags[source])}")
        if nvcc:
            lines.append(f"build cuda.o: cuda {path(ROOT / 'csrc' / 'cuda.cu')}")
            objects.append("cuda.o")
        lines.append(f"build {path(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    setup(ext_modules=[Extension("fusedopt._C", sources=[])], cmdclass={"build_ext": BuildExt})
