"""What CUDA kernels ask of a GPU, read from their machine code; needs no GPU.

    python benchmarks/machine_code.py build/fusedopt/cuda.o --kernel 'update_kernel<Adam<float'

Reads a cubin, or the cubin for --arch in an object file, a library or a program. Prints a line for
each kernel:

    regs         registers of a thread
    stack        bytes of stack of a thread
    st/ld        bytes that its instructions store to and load from local memory: spills, and arrays
    static       bytes of static shared memory of a block
    warps        how many fit on a multiprocessor of sm_90, in blocks of --threads threads with
                 --dynamic-shared bytes
    code         instructions, in all
    trip         instructions of one trip of the main loop
    global       bytes that a lane loads from and stores to global memory on that trip
    calls        calls on it, of which only the call itself is counted
    loops        loops inside it that the trip enters, counted as one trip each
    rsq/rcp      approximate roots and reciprocals on it
    /512         the trip's instructions, for --elements elements of a warp; then the part of each
                 class, which add up to it

The main loop is, of the loops that calculate in floating point and store, the one whose trip moves
most bytes by 16 at a time; if none moves any so, the one with most floating-point arithmetic. (Not
the one that moves most bytes of any width: a loop over counters moves more.)

A trip is the way from the loop's head back to it that moves most bytes by 16 at a time; of several,
the one that enters least of the loops inside it, then the one that moves most bytes, then the one
with fewest calls, then with fewest instructions. So wide accesses are preferred to narrow ones,
options that load or store are on, those that only calculate are off, and divisions and roots do not
take their slow ways. With --bytes it is a way on which a lane moves exactly so many bytes from and
to global memory; --loops lists what there is.
Bytes are of global and shared memory; those inside an inner loop are the inner loop's only.

Every instruction on the way is counted once, whether its predicate is true or not. Where lanes of a
warp go different ways, a GPU executes both, but one is counted. Generic loads and stores (LD, ST)
are taken for global ones. Atomics and bulk copies are instructions; their bytes are not counted.

How many elements a lane handles on a trip is not in the machine code: --lane-elements says it.
Roots and reciprocals are there to check it by.

What one must not conclude: a time. Some instructions take several times as long to issue as others
(MUFU, conversions, double precision), and a warp may wait for memory instead. Nor the instructions
of a step: what is before, between and after the trips is not counted.

Needs nvdisasm, and cuobjdump for files that are no cubins: on the PATH, in CUDA_HOME, or of the
packages nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

# A multiprocessor of sm_90.
REGISTERS = 65536
REGISTER_UNIT = 256  # of a warp
PARTITIONS = 4  # each runs its own warps, with its part of the registers
MAX_WARPS = 64
MAX_BLOCKS = 32
SHARED = 228 << 10
SHARED_UNIT = 128  # of a block
SHARED_RESERVED = 1 << 10  # of each block, for the system

LANES = 32
WIDE = 16  # bytes, the most that most GPUs load at a time

GLOBAL_LOADS = ("LDG", "LD", "LDGSTS")
GLOBAL_STORES = ("STG", "ST")
SHARED_ACCESSES = ("LDS", "STS")
STORES = (*GLOBAL_STORES, "STS")
JUMPS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU")
ENDS = ("EXIT", "RET", "KILL")

# How names of instructions begin; the first class that matches counts. What matches none is
# "integer", such as the shifts that make float32 of bfloat16.
CLASSES = {
    "memory": r"U?LD|ST|ATOM|RED(?!UX)|CCTL|\w*MEMBAR|\w*ERRBAR|DEPBAR|UBLK|U?SYNCS|FENCE|SHFL",
    "control": r"BR|JM|EXIT|CALL|RET|BSSY|BSYNC|BAR|WARPSYNC|ENDCOLL|YIELD|NOP|BPT|KILL|NANOS|VOTE",
    "convert": r"F2|I2|FRND",
    "uniform": r"U|R2U|S2U|REDUX",
    "move": r"MOV|CS2R|S2R|P2R|R2P",
    "arithmetic": r"F(?!LO)|D|H|MUFU",
}


class Instruction(NamedTuple):
    """One line of the disassembly."""

    predicate: str  # "", or one such as "@!P0"
    opcode: str  # with its suffixes
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.split(".", 1)[0]

    @property
    def bytes(self) -> int:
        """How many bytes a load or store moves for one lane."""
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((widths[s] for s in self.opcode.split(".") if s in widths), 4)

    @property
    def kind(self) -> str:
        """Its class."""
        # What also moves registers, and makes float32 of float16.
        if re.match(r"(IMAD|HFMA2) \w+, -?RZ, RZ, ", f"{self.name} {self.operands}"):
            return "move"
        if self.opcode.startswith("HADD2.F32"):
            return "convert"
        return next((k for k, names in CLASSES.items() if re.match(names, self.name)), "integer")


@dataclass
class Block:
    """Instructions that are executed one after another, and the blocks that may come next."""

    at: int  # the first one's address
    code: list[Instruction]
    next: list[int] = field(default_factory=list)

    def moved(self, *names: str, at_least: int = 0) -> int:
        """Bytes that instructions of these names, and of this width, move for one lane."""
        return sum(i.bytes for i in self.code if i.name in names and i.bytes >= at_least)


class Trip(NamedTuple):
    """A way through a loop. The best one is the greatest."""

    wide: int  # bytes that are moved by 16 or more at a time
    fewer_loops: int  # blocks of loops inside, counted down from zero
    bytes: int  # from and to global and shared memory
    stores: int
    fewer_calls: int  # counted down, too, as
    fewer_instructions: int
    global_bytes: int
    blocks: tuple[int, ...]

    @property
    def calls(self) -> int:
        """How many calls are on it."""
        return -self.fewer_calls

    @property
    def instructions(self) -> int:
        """How many instructions are on it."""
        return -self.fewer_instructions


class Loop(NamedTuple):
    """A natural loop."""

    head: int
    blocks: set[int]
    heads: set[int]  # of the loops inside it
    own: set[int]  # those of its blocks that are in no loop inside it
    trips: list[Trip]  # the best one for each number of bytes from and to global memory


@dataclass
class Kernel:
    """What a cubin says about one kernel."""

    name: str
    registers: int
    stack: int
    shared: int
    max_threads: int | None  # of a block, where launch bounds say it
    blocks: list[Block]

    def code(self, blocks: tuple[int, ...] | None = None) -> list[Instruction]:
        """The instructions of some blocks, or all."""
        chosen = self.blocks if blocks is None else [self.blocks[n] for n in blocks]
        return [i for block in chosen for i in block.code]

    def moved(self, *names: str, blocks: tuple[int, ...] | None = None) -> int:
        """Bytes that instructions of these names move for one lane, in some blocks or in all."""
        return sum(i.bytes for i in self.code(blocks) if i.name in names)

    def warps(self, threads: int, dynamic_shared: int = 0) -> int:
        """How many warps, in blocks of so many threads, a multiprocessor of sm_90 has at a time."""
        block_warps = -(-threads // LANES)
        warp_registers = -(-self.registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
        warps = min(REGISTERS // PARTITIONS // warp_registers * PARTITIONS, MAX_WARPS)
        shared = -(-(self.shared + dynamic_shared) // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
        return min(warps // block_warps, SHARED // shared, MAX_BLOCKS) * block_warps

    def main(self, global_bytes: int | None = None) -> tuple[Loop, Trip] | None:
        """The main loop and its trip, or one that moves exactly so many bytes; None without."""
        best = []
        for loop in find_loops(self.blocks):
            trips = [t for t in loop.trips if t.stores and global_bytes in (None, t.global_bytes)]
            if trips:
                trip = max(trips)
                own = self.code(tuple(loop.own.intersection(trip.blocks)))
                arithmetic = sum(i.kind == "arithmetic" for i in own)
                best.append((trip.wide if arithmetic else 0, arithmetic, loop, trip))
        return max(best, key=lambda found: found[:2])[2:] if best else None


def find_tool(name: str) -> str | None:
    """Where CUDA's tool of this name is."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packages = [str(found) for folder in sys.path for found in Path(folder).glob("nvidia/*/bin")]
    folders = [os.environ.get("PATH", ""), str(Path(home, "bin")), *packages]
    return shutil.which(name, path=os.pathsep.join(folders))


def run_tool(name: str, *arguments: str, folder: str | None = None) -> str:
    """What CUDA's tool of this name prints; exits when there is none, or when it fails."""
    tool = find_tool(name)
    if tool is None:
        sys.exit(f"There is no {name}; the package nvidia-cuda-{name} has it, and CUDA's toolkit.")
    result = subprocess.run([tool, *arguments], capture_output=True, text=True, cwd=folder)
    if result.returncode != 0:
        sys.exit(f"{name} {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def disassemble(path: Path, arch: str = "sm_90") -> str:
    """What nvdisasm prints of a cubin, or of those for arch in another file."""
    if path.suffix == ".cubin":
        return run_tool("nvdisasm", str(path))
    with tempfile.TemporaryDirectory() as folder:
        run_tool("cuobjdump", "-xelf", "all", str(path.resolve()), folder=folder)
        cubins = sorted(Path(folder).glob(f"*.{arch}.cubin"))
        return "".join(run_tool("nvdisasm", str(cubin)) for cubin in cubins)


LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
INSTRUCTION_BYTES = 16


def read_kernels(text: str) -> list[Kernel]:
    """The kernels in what nvdisasm has printed, in order of their names in the source."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("\t.section\t"):
            lines = sections.setdefault(line.split("\t")[2].split(",")[0], [])
        lines.append(line)
    attributes = {}
    for entry in "\n".join(sections.get(".nv.info", [])).split("EIATTR_"):
        for symbol, value in re.findall(r"index@\((\S+)\)\n.*\.word\s+(\w+)", entry):
            attributes[entry.split("\n", 1)[0], symbol] = int(value, 16)
    # From sm_90 on the section has room for what is reserved, too.
    newer = int((re.findall(r"^\t\.target\tsm_(\d+)", text, re.MULTILINE) or "0")[0]) >= 90

    kernels = []
    names = [s.removeprefix(".text.") for s in sections if s.startswith(".text.")]
    for name, source_name in zip(names, source_names(names), strict=True):
        info = "\n".join(sections.get(f".nv.info.{name}", []))
        bounds = re.search(r"EIATTR_MAX_THREADS\n(?:.*\n){5}((?:.*\.word\s+\w+\n){3})", info)
        threads = [int(n, 16) for n in re.findall(r"\.word\s+(\w+)", bounds[1])] if bounds else []
        shared = re.search(r"\.zero\s+(\d+)", "\n".join(sections.get(f".nv.shared.{name}", [])))
        kernels.append(
            Kernel(
                name=source_name,
                registers=attributes["REGCOUNT", name],
                stack=attributes.get(("FRAME_SIZE", name), 0),
                shared=int(shared[1]) - newer * SHARED_RESERVED if shared else 0,
                max_threads=threads[0] * threads[1] * threads[2] if threads else None,
                blocks=read_blocks(sections[f".text.{name}"]),
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def source_names(names: list[str]) -> list[str]:
    """Names as in the source, without their arguments and namespaces."""
    if shutil.which("c++filt") is None:
        return names
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return [
        re.sub(r"\(.*\)$|\b[a-z]\w*::", "", name).removeprefix("void ")
        for name in result.stdout.splitlines()
    ]


def read_blocks(lines: list[str]) -> list[Block]:
    """The basic blocks of a section; what is called is not among the next ones of any.

    BSSY, BSYNC, BREAK and WARPSYNC say which lanes wait for which. They are no jumps: what comes
    after a BSYNC is where its lanes go on.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            at = len(code) * INSTRUCTION_BYTES
            if int(found[1], 16) != at:
                raise ValueError(
                    f"the instruction at {at:#x}, before {line.strip()}, is unreadable"
                )
            code.append(Instruction(found[2] or "", found[3], found[4]))

    starts = {0, *labels.values(), *(n + 1 for n, i in enumerate(code) if i.name in JUMPS + ENDS)}
    order = sorted(n for n in starts if n < len(code))
    number = {start: n for n, start in enumerate(order)}
    blocks = []
    for start, end in zip(order, [*order[1:], len(code)], strict=True):
        block = Block(start * INSTRUCTION_BYTES, code[start:end])
        last = block.code[-1]
        # The condition may be an operand: "BRA P0, L", "BRA.DIV UR4, L", "BRA.U !UP0, L".
        conditional = last.predicate or re.match(r"[!~]*U?[PR]\w+, `", last.operands)
        if last.name in JUMPS:
            targets = re.findall(r"\.L_x_\d+", last.operands)
            block.next = [number[labels[label]] for label in targets]
        if end in number and (conditional or last.name not in JUMPS + ENDS):
            block.next.append(number[end])
        blocks.append(block)
    return blocks


def find_loops(blocks: list[Block]) -> list[Loop]:
    """The natural loops. (Loops that one can jump into the middle of are none.)"""
    order = reverse_postorder(blocks)
    rank = {at: n for n, at in enumerate(order)}
    before: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for n in blocks[at].next:
            before[n].append(at)

    # Each block's closest dominator, by the method of Cooper, Harvey and Kennedy.
    dominator = {0: 0}

    def common(a: int, b: int) -> int:
        while a != b:
            if rank[a] > rank[b]:
                a = dominator[a]
            else:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            known = [b for b in before[at] if b in dominator]
            found = known[0]
            for b in known[1:]:
                found = common(found, b)
            changed |= dominator.get(at) != found
            dominator[at] = found

    bodies: dict[int, set[int]] = {}
    for at in order:
        for head in blocks[at].next:
            if rank[head] <= rank[at] and common(head, at) == head:
                body = bodies.setdefault(head, {head})
                rest = [at]
                while rest:
                    b = rest.pop()
                    if b not in body:
                        body.add(b)
                        rest += before[b]
    loops = []
    for head, body in bodies.items():
        heads = {h for h in bodies if h != head and h in body}
        own = body.difference(*(bodies[h] for h in heads))
        trips = find_trips(blocks, sorted(body, key=rank.__getitem__), own)
        loops.append(Loop(head, body, heads, own, trips))
    return loops


def reverse_postorder(blocks: list[Block]) -> list[int]:
    """The blocks that are reached, each before those that follow it, but for ways back in loops."""
    order, seen, stack = [], {0}, [(0, iter(blocks[0].next))]
    while stack:
        at, following = stack[-1]
        n = next((n for n in following if n not in seen), None)
        if n is None:
            order.append(at)
            stack.pop()
        else:
            seen.add(n)
            stack.append((n, iter(blocks[n].next)))
    return order[::-1]


def find_trips(blocks: list[Block], body: list[int], own: set[int]) -> list[Trip]:
    """The best ways from a loop's first block back to it, one for each number of global bytes."""
    head = body[0]
    ways: dict[int, dict[int, Trip]] = {at: {} for at in body}
    back: dict[int, Trip] = {}
    ways[head][0] = Trip(0, 0, 0, 0, 0, 0, 0, ())
    done = set()
    for at in body:
        done.add(at)
        block = blocks[at]
        spaces = (*GLOBAL_LOADS, *GLOBAL_STORES, *SHARED_ACCESSES) if at in own else ()
        global_names = (*GLOBAL_LOADS, *GLOBAL_STORES) if at in own else ()
        step = (
            block.moved(*spaces, at_least=WIDE),
            -(at not in own),
            block.moved(*spaces),
            block.moved(*(STORES if at in own else ())),
            -sum(i.name == "CALL" for i in block.code),
            -len(block.code),
            block.moved(*global_names),
            (at,),
        )
        for way in ways[at].values():
            trip = Trip(*(a + b for a, b in zip(way, step, strict=True)))
            for n in block.next:
                # Other ways back are those of loops inside.
                to = back if n == head else ways[n] if n in ways and n not in done else None
                if to is not None:
                    to[trip.global_bytes] = max(trip, to.get(trip.global_bytes, trip))
    return list(back.values())


KERNEL_COLUMNS = ("regs", "stack", "st/ld", "static", "warps", "code")
TRIP_COLUMNS = ("trip", "global", "calls", "loops", "rsq/rcp")
CLASS_COLUMNS = ("arithmetic", "integer", "convert", "memory", "control", "uniform", "move")


def print_table(
    kernels: list[Kernel],
    *,
    threads: int | None = None,
    dynamic_shared: int = 0,
    elements: int = 512,
    lane_elements: int = 8,
    global_bytes: int | None = None,
    loops: bool = False,
) -> None:
    """A line for each kernel; the module's docstring says what the columns are."""
    columns = (*KERNEL_COLUMNS, *TRIP_COLUMNS, f"/{elements}", *CLASS_COLUMNS)
    widths = [max(len(column), 7) for column in columns]
    print(*(f"{column:>{w}}" for column, w in zip(columns, widths, strict=True)), " kernel")
    for kernel in kernels:
        row = [
            kernel.registers,
            kernel.stack,
            f"{kernel.moved('STL')}/{kernel.moved('LDL')}",
            kernel.shared,
            kernel.warps(threads or kernel.max_threads or 128, dynamic_shared),
            len(kernel.code()),
        ]
        found = kernel.main(global_bytes)
        if found is None:
            row += ["-"] * (len(columns) - len(row))
        else:
            loop, trip = found
            code = kernel.code(trip.blocks)
            roots = sum(i.opcode.startswith("MUFU.RSQ") for i in code)
            reciprocals = sum(i.opcode.startswith("MUFU.RCP") for i in code)
            loads = kernel.moved(*GLOBAL_LOADS, blocks=trip.blocks)
            stores = kernel.moved(*GLOBAL_STORES, blocks=trip.blocks)
            row += [trip.instructions, f"{loads}/{stores}", trip.calls]
            row += [len(loop.heads.intersection(trip.blocks)), f"{roots}/{reciprocals}"]
            kinds = Counter(i.kind for i in code)
            counts = (trip.instructions, *(kinds[kind] for kind in CLASS_COLUMNS))
            row += [round(n * elements / (LANES * lane_elements)) for n in counts]
        print(*(f"{value:>{w}}" for value, w in zip(row, widths, strict=True)), f" {kernel.name}")
        if loops:
            print_loops(kernel)


def print_loops(kernel: Kernel) -> None:
    """Each loop of a kernel, and its ways that no other one beats in bytes and instructions."""
    for loop in sorted(find_loops(kernel.blocks), key=lambda loop: loop.head):
        print(f"    loop at {kernel.blocks[loop.head].at:#x}, with {len(loop.heads)} inside it:")
        fewest = None
        for trip in sorted(loop.trips, key=lambda trip: -trip.global_bytes):
            if fewest is None or trip.instructions < fewest:
                fewest = trip.instructions
                print(f"        {trip.global_bytes:>7} bytes {fewest:>7} instructions")


def describe(path: Path, arch: str) -> str:
    """What the numbers are of: compiler, day, commit."""
    from gpu_report import commit  # (of this folder, which is not a package to everyone)

    elf = run_tool("cuobjdump", "-arch", arch, "-elf", str(path.resolve()))
    compiler = re.search(r"Tool Version:\s*(.+)", elf)  # as the assembler has noted it
    made = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).date()
    return f"{arch}, {compiler[1] if compiler else 'unknown tools'}, {made}, commit {commit()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--kernel", default="", metavar="REGEX", help="part of the kernels' names")
    parser.add_argument("--arch", default="sm_90", help="(default: sm_90)")
    parser.add_argument("--threads", type=int, help="(default: the launch bounds', or 128)")
    parser.add_argument("--dynamic-shared", type=int, default=0, metavar="BYTES")
    parser.add_argument("--elements", type=int, default=512, help="(default: 512)")
    parser.add_argument("--lane-elements", type=int, default=8, help="(default: 8)")
    parser.add_argument("--bytes", type=int, help="from and to global memory, of a lane on a trip")
    parser.add_argument("--describe", action="store_true", help="say first what was compiled")
    parser.add_argument("--loops", action="store_true", help="list each kernel's loops")
    options = parser.parse_args()
    kernels = read_kernels(disassemble(options.file, options.arch))
    kernels = [kernel for kernel in kernels if re.search(options.kernel, kernel.name)]
    if not kernels:
        sys.exit(f"{options.file} has no such kernels for {options.arch}.")
    if options.describe:
        print(describe(options.file, options.arch), end="\n\n")
    print_table(
        kernels,
        threads=options.threads,
        dynamic_shared=options.dynamic_shared,
        elements=options.elements,
        lane_elements=options.lane_elements,
        global_bytes=options.bytes,
        loops=options.loops,
    )


if __name__ == "__main__":
    main()
