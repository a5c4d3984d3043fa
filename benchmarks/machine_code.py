"""What CUDA kernels will ask of a GPU, read from their machine code; needs no GPU.

    python benchmarks/machine_code.py build/fusedopt/cuda.o --kernel 'update_kernel.*float'

Reads a cubin, or all cubins of an object file, a library or a program, and prints a line for each
kernel: registers of a thread, bytes of stack, bytes of local memory that its instructions store and
load (spills and local arrays), static shared memory of a block, warps that fit on a multiprocessor
of sm_90, instructions in all, and in the main loop those of one trip, of --elements elements, and
each class's part in them.

The **main loop** is, of the loops that calculate in floating point and store to global memory, the
one whose trip moves most bytes by 16 at a time; if none moves any so, the one with most arithmetic.
(Not the one with most bytes of any width: a loop over counters moves more.) What lies in a loop
inside another one is the inner one's only.

A **trip** is the way from the loop's head back to it that moves most bytes; of such ways one with
fewest calls, and then fewest instructions. So a way of 16 bytes at a time is taken before one of 4
at a time, and the slow ways of divisions and roots are not taken. (--bytes takes the ways that move
exactly so many; --loops lists loops and their ways.) Each instruction on the way is counted once,
whether its predicate is true or not; a call is one instruction, without what it calls. Loops inside
the main one are counted as one trip each. A branch's two sides are never both counted, as would
happen to a warp whose lanes disagree.

Bytes are those of one lane, as if all predicates were true. Generic loads and stores (LD, ST) are
taken for global ones, bulk copies (UBLKCP) and atomics are not counted.

How many elements a lane handles in a trip is not in the machine code: --lane-elements says it. The
roots and reciprocals of a trip (rsq, rcp) are there to check it by.

What must **not** be concluded: time. A count is not a number of cycles: double precision, MUFU and
conversions are issued at a fraction of FFMA's rate, and a warp may wait for memory. Nor the
instructions of a whole step, as what is before, between and after the trips is not counted.

A file of several architectures is read as that of --arch. The disassembler is nvdisasm, and files
that are no cubins need cuobjdump: from the CUDA toolkit, beside nvcc, on the PATH, or from the
packages nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump in Python's environment.
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
from pathlib import Path

# A multiprocessor of sm_90.
REGISTERS = 65536
REGISTER_UNIT = 256  # of a warp
PARTITIONS = 4  # each has its part of the registers
MAX_WARPS = 64
MAX_BLOCKS = 32
SHARED = 228 << 10
SHARED_UNIT = 128
SHARED_RESERVED = 1 << 10  # of each block, for the system

LANES = 32

# Opcodes up to their first dot, the first class whose pattern matches; else "integer".
CLASSES = {
    "memory": r"U?LD|ST|ATOM|RED|CCTL|MEMBAR|ERRBAR|CGAERRBAR|DEPBAR|UBLK|U?SYNCS|FENCE|SHFL",
    "branch": r"BR|JM|EXIT|CALL|RET|BSSY|BSYNC|BREAK|BAR|WARPSYNC|ENDCOLL|YIELD|NOP|BPT|KILL|NANOS"
    r"|ELECT|BMOV|VOTE",
    "convert": r"F2|I2|FRND",
    "uniform": r"U|R2U|S2U|REDUX",
    "move": r"U?MOV|CS2R|S2R|P2R|R2P|SGXT$",
    "arithmetic": r"F|D|H|MUFU|CREDUX",
}


LOADS = ("LDG", "LD", "LDGSTS")
STORES = ("STG", "ST")


@dataclass
class Instruction:
    """One line of the disassembly."""

    at: int
    predicate: str  # "" or one such as "@!P0"
    opcode: str  # with its suffixes
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """How many bytes a memory instruction moves for one lane."""
        suffixes = set(self.opcode.split(".")[1:])
        for width, names in {1: ("U8", "S8"), 2: ("U16", "S16"), 8: ("64",), 16: ("128",)}.items():
            if suffixes & set(names):
                return width
        return 32 if "256" in suffixes else 4

    @property
    def kind(self) -> str:
        """Its class, for the breakdown."""
        # Integer multiply-adds and half-precision ones with zero are how registers are moved, and
        # HADD2.F32 is how float16 becomes float32.
        if self.opcode.startswith(("IMAD.MOV", "IMAD.U32 R")) or (
            self.name == "HFMA2" and re.match(r"R\d+, -RZ, RZ,", self.operands)
        ):
            return "move"
        if self.opcode.startswith("HADD2.F32"):
            return "convert"
        return next((k for k, names in CLASSES.items() if re.match(names, self.name)), "integer")


@dataclass
class Block:
    """Instructions that are executed one after another, and the blocks that may be next."""

    code: list[Instruction]
    next: list[int] = field(default_factory=list)

    def moved(self, *names: str) -> int:
        """Bytes that the instructions of these names move for one lane."""
        return sum(i.bytes for i in self.code if i.name in names)

    @property
    def loads(self) -> int:
        """Bytes from global memory, for one lane."""
        return self.moved(*LOADS)

    @property
    def stores(self) -> int:
        """Bytes to global memory, for one lane."""
        return self.moved(*STORES)


@dataclass(frozen=True)
class Trip:
    """A way through a loop."""

    blocks: tuple[int, ...]
    bytes: int
    stores: int
    calls: int
    instructions: int


@dataclass
class Loop:
    """A natural loop: its blocks and its ways."""

    head: int
    blocks: set[int]
    own: set[int]  # those that are in no loop inside it
    inner: int  # how many loops are inside it
    trips: dict[int, Trip]  # by the bytes that they move


@dataclass
class Kernel:
    """What the file says about one kernel."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    max_threads: int | None  # of a block, if its launch bounds say so
    code: list[Instruction]
    labels: dict[str, int]

    def local(self, *names: str) -> int:
        """Bytes that instructions on local memory move for one lane."""
        return sum(i.bytes for i in self.code if i.name in names)

    def warps(self, threads: int, dynamic_shared: int = 0) -> int:
        """How many warps of blocks of so many threads are on a multiprocessor at a time."""
        block_warps = -(-threads // LANES)
        warp_registers = -(-self.registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
        warps = REGISTERS // PARTITIONS // warp_registers * PARTITIONS
        shared = -(-(self.shared + dynamic_shared) // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
        blocks = min(min(warps, MAX_WARPS) // block_warps, SHARED // shared, MAX_BLOCKS)
        return blocks * block_warps


def find_tool(name: str) -> str:
    """CUDA's tool of this name; exits when there is none."""
    homes = [Path(folder, "nvidia") for folder in sys.path]
    packaged = [str(found) for home in homes for found in home.glob(f"*/bin/{name}")]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    beside = str(Path(nvcc).resolve().with_name(name))
    for candidate in (os.environ.get(name.upper()), beside, name, *packaged):
        if candidate and shutil.which(candidate):
            return candidate
    sys.exit(
        f"{name} is neither beside nvcc nor on the PATH; install CUDA's, "
        f"or the package nvidia-cuda-{name}, or set {name.upper()}."
    )


def run(*command: str, cwd: str | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if result.returncode != 0:
        sys.exit(f"{command[0]} failed: {result.stderr.strip()}")
    return result.stdout


def disassemble(path: Path, arch: str = "sm_90") -> str:
    """Nvdisasm's text of a cubin, or of the one for arch in another file."""
    nvdisasm = find_tool("nvdisasm")
    if path.suffix == ".cubin":
        return run(nvdisasm, str(path))
    with tempfile.TemporaryDirectory() as folder:
        run(find_tool("cuobjdump"), "-xelf", arch, str(path.resolve()), cwd=folder)
        return "".join(run(nvdisasm, str(cubin)) for cubin in sorted(Path(folder).iterdir()))


INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?) ?;")
LABEL = re.compile(r"(\.L_x_\d+):")
TARGET = re.compile(r"\.L_x_\d+")


def read_kernels(text: str) -> list[Kernel]:
    """The kernels of a disassembly."""
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("\t.section\t"):
            name = line.split("\t")[2].split(",")[0]
            lines = sections.setdefault(name, [])
        elif sections:
            lines.append(line)
    arch = re.findall(r"^\t\.target\tsm_(\w+)", text, re.MULTILINE)
    attributes: dict[tuple[str, str], int] = {}
    for entry in "\n".join(sections.get(".nv.info", [])).split("EIATTR_"):
        kind = entry.split("\n")[0]
        for of, value in re.findall(r"index@\((\S+)\)\n.*\.word\s+(\w+)", entry):
            attributes[kind, of] = int(value, 16)

    kernels = []
    for section, lines in sections.items():
        if not section.startswith(".text."):
            continue
        name = section.removeprefix(".text.")
        bounds = re.search(
            r"EIATTR_MAX_THREADS\n(?:.*\n){5}" + 3 * r".*\.word\s+(\w+)\n",
            "\n".join(sections.get(f".nv.info.{name}", [])) + "\n",
        )
        shared = re.search(r"\.zero\s+(\d+)", "\n".join(sections.get(f".nv.shared.{name}", [])))
        code, labels = read_code(lines)
        kernels.append(
            Kernel(
                name=name,
                arch=f"sm_{arch[0]}",
                registers=attributes["REGCOUNT", name],
                stack=attributes.get(("FRAME_SIZE", name), 0),
                # From sm_90 on the section has room for what is reserved, too.
                shared=int(shared[1]) - SHARED_RESERVED * (arch[0] >= "90") if shared else 0,
                max_threads=int(bounds[1], 16) * int(bounds[2], 16) * int(bounds[3], 16)
                if bounds
                else None,
                code=code,
                labels=labels,
            )
        )
    return kernels


def read_code(lines: list[str]) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a section, and which one each label is before."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            at, predicate, opcode, operands = found.groups()
            code.append(Instruction(int(at, 16), predicate or "", opcode, operands))
    return code, labels


JUMPS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU")
ENDS = ("EXIT", "RET", "KILL")


def build_blocks(code: list[Instruction], labels: dict[str, int]) -> list[Block]:
    """The basic blocks; what is called is not among any block's next ones.

    BSSY, BSYNC, BREAK and WARPSYNC say which lanes wait for which, not where they go: a BSYNC is
    followed by where its lanes go on.
    """
    starts = {0, *labels.values()}
    starts |= {at + 1 for at, i in enumerate(code) if i.name in JUMPS + ENDS}
    order = sorted(at for at in starts if at < len(code))
    number = {at: n for n, at in enumerate(order)}
    blocks = []
    for begin, end in zip(order, [*order[1:], len(code)], strict=True):
        block = Block(code[begin:end])
        last = block.code[-1]
        # "BRA P0, L", "BRA.DIV UR4, L" and "BRA.U !UP0, L" have their condition as an operand.
        always = not last.predicate and not re.match(r"!?[~U]*[PR]\w+, `", last.operands)
        if last.name in JUMPS:
            targets = [labels[label] for label in TARGET.findall(last.operands)]
            block.next = [number[at] for at in targets if at in number]
        if not (always and last.name in JUMPS + ENDS) and end in number:
            block.next.append(number[end])
        blocks.append(block)
    return blocks


def reverse_postorder(blocks: list[Block]) -> list[int]:
    """Blocks that can be reached, each before all that follow it but by a loop's way back."""
    order, seen, stack = [], {0}, [(0, iter(blocks[0].next))]
    while stack:
        at, following = stack[-1]
        for n in following:
            if n not in seen:
                seen.add(n)
                stack.append((n, iter(blocks[n].next)))
                break
        else:
            order.append(at)
            stack.pop()
    return order[::-1]


def find_loops(blocks: list[Block]) -> list[Loop]:
    """The natural loops. (Jumps into the middle of a loop make none.)"""
    order = reverse_postorder(blocks)
    rank = {at: n for n, at in enumerate(order)}
    before: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for n in blocks[at].next:
            before[n].append(at)

    # Each block's closest dominator (Cooper, Harvey, Kennedy).
    dominator = {order[0]: order[0]}

    def common(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = dominator[a]
            while rank[b] > rank[a]:
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
                stack = [at]
                while stack:
                    b = stack.pop()
                    if b not in body:
                        body.add(b)
                        stack += before[b]
    loops = []
    for head, body in bodies.items():
        inner = [h for h in bodies if h != head and h in body]
        own = body.difference(*(bodies[h] for h in inner))
        trips = find_trips(blocks, head, sorted(body, key=rank.__getitem__), own, rank)
        loops.append(Loop(head, body, own, len(inner), trips))
    return loops


def find_trips(
    blocks: list[Block], head: int, body: list[int], own: set[int], rank: dict[int, int]
) -> dict[int, Trip]:
    """The best way from the head back to it for each number of bytes that one moves."""
    ways: dict[int, dict[int, Trip]] = {at: {} for at in body}
    back: dict[int, Trip] = {}
    ways[head] = {0: Trip((), 0, 0, 0, 0)}

    def offer(to: dict[int, Trip], trip: Trip) -> None:
        known = to.get(trip.bytes)
        if known is None or (trip.calls, trip.instructions) < (known.calls, known.instructions):
            to[trip.bytes] = trip

    for at in body:
        block = blocks[at]
        stores = block.stores if at in own else 0
        moved = stores + (block.loads if at in own else 0)
        calls = sum(i.name == "CALL" for i in block.code)
        for way in ways[at].values():
            trip = Trip(
                (*way.blocks, at),
                way.bytes + moved,
                way.stores + stores,
                way.calls + calls,
                way.instructions + len(block.code),
            )
            for n in block.next:
                if n == head:
                    offer(back, trip)
                elif n in ways and rank[n] > rank[at]:
                    offer(ways[n], trip)
    return back


def main_trip(
    blocks: list[Block], loops: list[Loop], moved: int | None = None
) -> tuple[Loop, Trip] | None:
    """The main loop and its trip, or None; with `moved`, of the trips that move so many bytes."""
    found = []
    for loop in loops:
        trips = [t for t in loop.trips.values() if t.stores and moved in (None, t.bytes)]
        if trips:
            found.append((loop, max(trips, key=lambda trip: trip.bytes)))

    def weight(pair: tuple[Loop, Trip]) -> tuple[int, int]:
        loop, trip = pair
        code = [i for at in loop.own.intersection(trip.blocks) for i in blocks[at].code]
        wide = sum(i.bytes for i in code if i.name in LOADS + STORES and i.bytes >= 16)
        arithmetic = sum(i.kind == "arithmetic" for i in code)
        return wide if arithmetic else 0, arithmetic

    return max(found, key=weight, default=None)  # the first of those that weigh the same


def demangle(names: list[str]) -> list[str]:
    """Names as in the source, without what all have in common."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return [
        re.sub(r"^void |fusedopt::|cuda::|\(.*\)$", "", name) for name in text.stdout.splitlines()
    ]


COLUMNS = ("regs", "stack", "st/ld", "shared", "warps", "code", "trip", "bytes", "calls", "rsq/rcp")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="The module's docstring says what is counted."
    )
    parser.add_argument("file", type=Path, help="a cubin, an object file, a library or a program")
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only those with such names")
    parser.add_argument("--arch", default="sm_90", help="default: sm_90")
    parser.add_argument("--threads", type=int, help="of a block (default: launch bounds, or 128)")
    parser.add_argument("--dynamic-shared", type=int, default=0, help="bytes of a block (0)")
    parser.add_argument("--elements", type=int, default=512, help="of a warp (default 512)")
    parser.add_argument("--lane-elements", type=int, default=8, help="of a lane, in a trip (8)")
    parser.add_argument("--bytes", type=int, help="trips that move so many bytes, for one lane")
    parser.add_argument("--loops", action="store_true", help="list each kernel's loops, too")
    options = parser.parse_args()
    kernels = read_kernels(disassemble(options.file, options.arch))
    if not kernels:
        sys.exit(f"{options.file} has no kernels for {options.arch}.")
    print_table(kernels, options)


def print_table(kernels: list[Kernel], options: argparse.Namespace) -> None:
    classes = (*list(CLASSES)[:-1], "integer", "arithmetic")
    per = f"/{options.elements}"
    print(*(f"{c:>{max(7, len(c))}}" for c in (*COLUMNS, per, *classes)), " kernel")
    names = demangle([kernel.name for kernel in kernels])
    for name, kernel in sorted(zip(names, kernels, strict=True), key=lambda pair: pair[0]):
        if not re.search(options.kernel, name):
            continue
        blocks = build_blocks(kernel.code, kernel.labels)
        loops = find_loops(blocks)
        threads = options.threads or kernel.max_threads or 128
        row = [
            kernel.registers,
            kernel.stack,
            f"{kernel.local('STL')}/{kernel.local('LDL')}",
            kernel.shared,
            kernel.warps(threads, options.dynamic_shared),
            len(kernel.code),
        ]
        found = main_trip(blocks, loops, options.bytes)
        if found:
            _, trip = found
            code = [i for at in trip.blocks for i in blocks[at].code]
            scale = options.elements / (LANES * options.lane_elements)
            kinds = Counter(i.kind for i in code)
            roots = sum(i.opcode.startswith(("MUFU.RSQ", "MUFU.SQRT")) for i in code)
            reciprocals = sum(i.opcode.startswith("MUFU.RCP") for i in code)
            row += [trip.instructions, trip.bytes, trip.calls, f"{roots}/{reciprocals}"]
            row += [round(n * scale) for n in (trip.instructions, *(kinds[c] for c in classes))]
        else:
            row += ["-"] * (5 + len(classes))
        widths = [max(7, len(c)) for c in (*COLUMNS, per, *classes)]
        print(*(f"{value:>{w}}" for value, w in zip(row, widths, strict=True)), f" {name}")
        if options.loops:
            for loop in sorted(loops, key=lambda loop: blocks[loop.head].code[0].at):
                ways = sorted(loop.trips.values(), key=lambda t: -t.bytes)
                text = ", ".join(f"{t.bytes}: {t.instructions}" for t in ways[:12])
                at = blocks[loop.head].code[0].at
                print(f"    loop at {at:#x}, {len(loop.blocks)} blocks, {loop.inner} loops in it;")
                print(f"        bytes: instructions  {text}")


if __name__ == "__main__":
    main()
