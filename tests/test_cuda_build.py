"""The CUDA kernels compile, and keep what they work on in registers; instructions are counted.

``make resources`` shows the table.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_core import CSRC, ROOT, load_setup

from fusedopt.extension import build_info, kernels

ARCHITECTURE = "sm_90"


def test_the_build_has_them() -> None:
    """Where there is an nvcc; and the module loads without a driver."""
    if load_setup().choose_cuda() is None:
        pytest.skip("no CUDA in this build")
    info = build_info()["CUDA"]
    assert re.match(r"compiled for [\daf,]+; \d+ device\(s\)", info), info


def test_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By default those that the compiler knows; what one asks for is not questioned."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_90a\\n'\n")
    nvcc.chmod(0o755)
    setup = load_setup()
    monkeypatch.delenv("FUSEDOPT_CUDA_ARCHS", raising=False)
    assert setup.cuda_archs(str(nvcc)) == "75,80,90"
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", "100a,120")
    assert setup.cuda_archs(str(nvcc)) == "100a,120"
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", "sm_90")
    with pytest.raises(SystemExit, match="FUSEDOPT_CUDA_ARCHS=sm_90"):
        setup.cuda_archs(str(nvcc))


def test_intermediate_code_is_shared() -> None:
    """From 8.0 on; but not with those whose code nobody else runs."""
    flags = load_setup().cuda_flags("75,80,90,100a,120")
    assert [flag for flag in flags if "gencode" in flag] == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,sm_90,sm_120,compute_80]",
        "-gencode=arch=compute_100a,code=[sm_100a]",
    ]


def compile_kernels(source: Path, cubin: Path) -> str:
    """Compile for one architecture, with setup.py's flags; what the assembler says of it."""
    setup = load_setup()
    nvcc = setup.choose_cuda()
    if nvcc is None:
        pytest.skip("no CUDA in this build")
    command = [
        *(nvcc, *setup.CUDA_KERNEL, f"-arch={ARCHITECTURE}", "-Xptxas=-v", "-cubin"),
        *('-DFUSEDOPT_CUDA_ARCHS=""', str(source), "-o", str(cubin)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "warning" not in result.stdout + result.stderr
    return subprocess.run(["c++filt"], input=result.stderr, capture_output=True, text=True).stdout


# Of each kernel, as the assembler tells it: name, stack, spill stores, spill loads, registers.
ASSEMBLED = re.compile(
    r"Compiling entry function '(.*?)' for .*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


# Of AdamW with formats that are numbers in kFormats: instructions for 512 elements of a warp, at
# most; warps on a multiprocessor, at least; and the bytes that 8 elements of a lane and the scales
# of their states are, to know that it is they which have been counted.
BARS = {
    **{0: (650, 32, 8 * 28), 1: (800, 24, 8 * 14), 2: (1000, 24, 8 * 26), 3: (1000, 24, 8 * 30)},
    **{4: (1600, 24, 8 * 16 + 16), 5: (1700, 24, 8 * 14 + 16)},
}


def built_kernels(folder: Path) -> dict[str, list[Any]]:
    """Of each architecture, in what `make` has built, if it is of these sources; else compiled now
    for one, which takes a while.
    """
    machine_code = load_machine_code()
    built = ROOT / "build" / "fusedopt" / "cuda.o"
    listed = []
    if built.exists() and load_setup().sources_digest() == kernels.SOURCES:
        listing = machine_code.run_tool("cuobjdump", "-lelf", str(built))
        listed = re.findall(r"\.(sm_\w+)\.cubin", listing)
    found = {
        arch: machine_code.read_kernels(machine_code.disassemble(built, arch)) for arch in listed
    }
    if ARCHITECTURE not in found:
        compile_kernels(CSRC / "cuda.cu", folder / "cuda.cubin")
        listing = machine_code.disassemble(folder / "cuda.cubin")
        found[ARCHITECTURE] = machine_code.read_kernels(listing)
    return found


def test_kernels_do_not_spill(tmp_path: Path) -> None:
    """And those for AdamW take no more instructions than they may."""
    machine_code = load_machine_code()
    if load_setup().choose_cuda() is None:
        pytest.skip("no CUDA in this build")
    if None in map(machine_code.find_tool, ("nvdisasm", "cuobjdump")):
        for name, *spilled, _ in ASSEMBLED.findall(
            compile_kernels(CSRC / "cuda.cu", tmp_path / "cuda.cubin")
        ):
            assert (name, *spilled) == (name, "0", "0", "0")
        pytest.skip("no nvdisasm and cuobjdump to count instructions with")
    built = built_kernels(tmp_path)
    machine_code.print_table(built[ARCHITECTURE])
    for arch, listed in built.items():
        for kernel in listed:
            spilled = kernel.stack, kernel.moved("STL"), kernel.moved("LDL")
            assert (arch, kernel.name, *spilled) == (arch, kernel.name, 0, 0, 0)
    named = {kernel.name: kernel for kernel in built[ARCHITECTURE]}
    rules = re.findall(r"run<(\w+<T.*?>)>\(\)", (CSRC / "select.h").read_text())
    rules = [rule for rule in rules if not rule.startswith("Stream<")]  # which are not compiled
    assert rules
    for rule in rules:
        instance = re.sub(r"\bT\b", "float", rule)
        assert f"direct_update_kernel<{instance}, 0>" in named
    for real in ("float", "double"):  # whatever the rule
        for states in range(4):
            assert f"update_kernel<AnyRule<{real}, {states}>, {real}>" in named
    for formats, (most, warps, moved) in BARS.items():
        kernel = named[f"direct_update_kernel<Adam<float, false>, {formats}>"]
        _, trip = kernel.main()
        assert trip.global_bytes == moved
        assert 2 * trip.instructions <= most
        assert kernel.warps(128) >= warps


def load_machine_code() -> ModuleType:
    path = ROOT / "benchmarks" / "machine_code.py"
    spec = importlib.util.spec_from_file_location("machine_code", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine_code"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


# Loops of which one knows what the assembler makes: in most of them each instruction becomes one of
# the machine's, as it must neither unroll nor leave volatile accesses away.
COUNTED = r"""
#define FMA "fma.rn.f32 a, b, c, a;"
#define TEN_FMAS FMA FMA FMA FMA FMA FMA FMA FMA FMA FMA
#define NARROW(x, at) "ld.volatile.global.f32 " x ", [%0 + " at "];"
#define FOUR_LOADS NARROW("a", "0") NARROW("b", "4") NARROW("c", "8") NARROW("d", "12")
#define BACK(at) "st.volatile.global.f32 [%0 + " at "], a;"
#define FIVE_STORES BACK("0") BACK("4") BACK("8") BACK("12") BACK("16")
#define LOAD "ld.volatile.global.v4.f32 {a, b, c, d}, [%0];"
#define STORE "st.volatile.global.v4.f32 [%0], {a, b, c, d};"
#define LOOP(label, n, body) \
  label ": .pragma \"nounroll\";" body \
  "add.s32 " n ", " n ", -1; setp.ne.s32 p, " n ", 0; @p bra " label ";"
#define ASSEMBLY(body) \
  asm volatile("{ .reg .pred p; .reg .f32 a, b, c, d; .reg .s32 m;" body "}" \
               : : "l"(x), "r"(n), "r"(option) : "memory")

using Four = float4*;

extern "C" __global__ void plain(Four x, int n, int option) {
  ASSEMBLY(LOOP("L", "%1", LOAD FMA FMA FMA FMA FMA FMA FMA STORE));
}

// The inner loop is the main one, although the outer one has more arithmetic and more bytes.
extern "C" __global__ void nested(Four x, int n, int option) {
  ASSEMBLY(LOOP("L",  "%1", NARROW("a", "0") NARROW("b", "4")
                FMA FMA FMA FMA FMA FMA FMA FMA FMA BACK("0") "mov.s32 m, %2;"
                LOOP("M", "m", LOAD FMA FMA FMA STORE)));
}

// Two ways in a loop: by 16 bytes at a time, and by 4, which is shorter and moves more. (Of still
// shorter ones the assembler would make one, with predicates.)
extern "C" __global__ void two_ways(Four x, int n, int option) {
  ASSEMBLY(LOOP("L", "%1", "setp.ne.s32 p, %2, 0; @p bra WIDE;"
                FOUR_LOADS TEN_FMAS FIVE_STORES "bra JOIN;"
                "WIDE:" LOAD TEN_FMAS TEN_FMAS STORE "JOIN:"));
}

extern "C" __global__ void unrolled(Four x, int n, int option) {
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    float4 v = x[i];
    asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(v.x) : "f"(v.y), "f"(v.z));
    asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(v.x) : "f"(v.y), "f"(v.w));
    x[i] = v;
  }
}

// Each of the four has a call for what is rare: huge, tiny, nan.
extern "C" __global__ void divided(Four x, int n, int option) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const float4 v = x[i];
    x[i] = {sqrtf(v.x), sqrtf(v.y), v.z / v.x, v.w / v.x};
  }
}

template <class T>
__global__ void __launch_bounds__(1024, 2) hungry(T* x) {
  __shared__ T shared[300];
  T many[48];
  for (int i = 0; i < 48; ++i) many[i] = x[i * 1024 + threadIdx.x];
  shared[threadIdx.x % 300] = many[0];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 48; ++k) {
    T sum = shared[k];
#pragma unroll
    for (int i = 0; i < 48; i += 5) sum += many[i] * many[(i + k) % 48];
    x[k * 1024 + threadIdx.x] = sum;
  }
}
template __global__ void hungry(float*);
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, dict, list]:
    """The script, what it says of these kernels, and what the assembler says."""
    machine_code = load_machine_code()
    if machine_code.find_tool("nvdisasm") is None:
        pytest.skip("no nvdisasm")
    folder = tmp_path_factory.mktemp("machine_code")
    (folder / "counted.cu").write_text(COUNTED)
    said = compile_kernels(folder / "counted.cu", folder / "counted.cubin")
    kernels = machine_code.read_kernels(machine_code.disassemble(folder / "counted.cubin"))
    return machine_code, {kernel.name: kernel for kernel in kernels}, ASSEMBLED.findall(said)


def on_trip(kernel: Any, global_bytes: int | None = None) -> dict[str, int]:
    """How many instructions there are on a trip of the main loop: all, and of each class."""
    _, trip = kernel.main(global_bytes)
    kinds = Counter(instruction.kind for instruction in kernel.code(trip.blocks))
    assert trip.instructions == kinds.total()
    kinds["integer"] += kinds.pop("uniform", 0)  # the assembler chooses
    return {"all": trip.instructions, "calls": trip.calls, "bytes": trip.global_bytes, **kinds}


def test_instructions_of_a_trip(counted: tuple) -> None:
    _, kernels, _ = counted
    loop = {"memory": 2, "integer": 2, "control": 1, "calls": 0, "bytes": 32}
    assert on_trip(kernels["plain"]) == {"all": 12, "arithmetic": 7, **loop}
    assert on_trip(kernels["nested"]) == {"all": 8, "arithmetic": 3, **loop}
    assert on_trip(kernels["unrolled"])["arithmetic"] == 4 * 2
    assert on_trip(kernels["unrolled"])["bytes"] == 4 * 32


def disassembled(listing: str) -> list[str]:
    """Labels and instructions as nvdisasm prints them."""
    lines, at = [], 0
    for line in map(str.strip, listing.strip().splitlines()):
        label = line.startswith(".L")
        lines.append(line if label else f"        /*{at:04x}*/    {line} ;")
        at += 0 if label else 16
    return lines


def test_where_jumps_go() -> None:
    """All kinds, as the disassembler prints them."""
    machine_code = load_machine_code()
    listing = """
        BSSY B0, `(.L_x_3)
        @P1 BRA P0, `(.L_x_2)
        @!P0 EXIT
        BRA.DIV UR4, `(.L_x_3)
    .L_x_1:
        FADD R1, R1, R1
    .L_x_2:
        CALL.REL.NOINC `($square_root)
        BRX R12 -0x1b0 (*"BRANCH_TARGETS .L_x_1,.L_x_2,.L_x_3"*)
        BREAK B0
        BRA.U !UP0, `(.L_x_1)
        BRA `(.L_x_2)
    .L_x_3:
        BSYNC B0
        RET.REL.NODEC R2 `(kernel)
        EXIT
    """
    lines = disassembled(listing)
    following = {block.at // 16: block.next for block in machine_code.read_blocks(lines)}
    numbers = {n: at for n, at in enumerate(following)}
    assert {at: {numbers[n] for n in to} for at, to in following.items()} == {
        **{0: {2, 5}, 2: {3}, 3: {4, 10}, 4: {5}, 5: {4, 5, 10}},
        **{7: {4, 9}, 9: {5}, 10: set(), 12: set()},
    }
    with pytest.raises(ValueError, match="0x40"):
        machine_code.read_blocks(lines[:4] + lines[6:])


def test_wide_accesses_are_the_trip(counted: tuple) -> None:
    _, kernels, _ = counted
    wide = on_trip(kernels["two_ways"])
    assert (wide["bytes"], wide["arithmetic"]) == (32, 20)
    narrow = on_trip(kernels["two_ways"], global_bytes=36)
    assert (narrow["bytes"], narrow["arithmetic"]) == (36, 10)
    assert narrow["all"] < wide["all"]
    assert kernels["two_ways"].main(global_bytes=8) is None


def test_slow_ways_are_not_counted(counted: tuple) -> None:
    _, kernels, _ = counted
    kernel = kernels["divided"]
    assert sum(i.name == "CALL" for i in kernel.code()) == 4
    _, trip = kernel.main()
    names = Counter(i.opcode for i in kernel.code(trip.blocks))
    assert (trip.calls, names["MUFU.RSQ"], names["MUFU.RCP"], names["FCHK"]) == (0, 2, 2, 2)
    # Newton's steps are some six multiplications and additions for each; no way is left out.
    arithmetic = on_trip(kernel)["arithmetic"]
    assert 4 * 6 <= arithmetic <= 4 * 10
    assert trip.instructions < len(kernel.code()) / 2


def test_calls_are_not_the_trip() -> None:
    """Although with what they call left out they make a way shorter."""
    machine_code = load_machine_code()
    lines = disassembled("""
    .L_x_1:
        LDG.E.128 R4, desc[UR4][R2.64]
        @P0 BRA `(.L_x_2)
        CALL.REL.NOINC `($square_root)
        BRA `(.L_x_3)
    .L_x_2:
        FMUL R4, R4, R5
        FFMA R4, R4, R5, R6
        FFMA R4, R4, R5, R6
        FFMA R4, R4, R5, R6
    .L_x_3:
        STG.E.128 desc[UR4][R2.64], R4
        @P1 BRA `(.L_x_1)
        EXIT
    """)
    kernel = machine_code.Kernel("", 32, 0, 0, None, machine_code.read_blocks(lines))
    assert on_trip(kernel) == {
        **{"all": 8, "arithmetic": 4, "memory": 2, "control": 2, "integer": 0},
        **{"calls": 0, "bytes": 32},
    }


def test_spills_are_seen(counted: tuple) -> None:
    """They and the registers are what the assembler says; others do not spill."""
    machine_code, kernels, said = counted
    assert len(said) == len(kernels) == 6
    for name, *numbers in said:
        kernel = kernels[machine_code.source_names([name])[0]]
        spilled = (kernel.stack, kernel.moved("STL"), kernel.moved("LDL"))
        assert [*map(str, spilled), str(kernel.registers)] == numbers
        assert (spilled > (0, 0, 0)) == (kernel.name == "hungry<float>")
        assert kernel.shared == (1200 if kernel.name == "hungry<float>" else 0)
        assert kernel.max_threads == (1024 if kernel.name == "hungry<float>" else None)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "warps"),
    [
        (32, 0, 128, 64),
        (33, 0, 128, 48),
        (128, 0, 128, 16),
        (168, 0, 128, 12),  # the most for three blocks
        (169, 0, 128, 8),
        (255, 0, 128, 8),
        (16, 0, 32, 32),  # so many blocks
        (16, 0, 96, 63),
        (16, 100 << 10, 128, 8),  # two blocks' shared memory
        (16, 113 << 10, 128, 8),
        (16, (113 << 10) + 1, 128, 4),
    ],
)
def test_warps_of_a_multiprocessor(registers: int, shared: int, threads: int, warps: int) -> None:
    """As NVIDIA's tables have it for sm_90."""
    kernel = load_machine_code().Kernel("", registers, 0, shared, None, [])
    assert kernel.warps(threads) == warps
    assert kernel.warps(threads, dynamic_shared=(228 << 10) - shared) == 0


def test_the_table(counted: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    machine_code, kernels, _ = counted
    machine_code.print_table([kernels["plain"], kernels["hungry<float>"]], lane_elements=4)
    head, plain, hungry = capsys.readouterr().out.splitlines()
    columns = head.split()
    row = dict(zip(columns, plain.split(), strict=True))
    assert (row["kernel"], row["trip"], row["global"], row["/512"]) == (
        "plain",
        "12",
        "16/16",
        "48",
    )
    classes = ("arithmetic", "convert", "memory", "control", "move")
    assert [row[name] for name in classes] == ["28", "0", "8", "4", "0"]
    assert int(row["integer"]) + int(row["uniform"]) == 8
    row = dict(zip(columns, hungry.split(), strict=True))
    assert (row["kernel"], row["warps"], row["static"]) == ("hungry<float>", "64", "1200")
