"""What a compiled program shows without a GPU: spills, approximate arithmetic, narrow accesses, narrow offsets.

Each check returns faults, in words; none is good. Tensor accesses and offsets are read from Triton's own IR, the rest
from what the hardware runs: PTX and the cubin, or AMD's assembly.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: The widest access of one thread, in bytes, and how many elements a program has that lets its threads have that on
#: NVIDIA's GPUs: 128 threads, 8 of bfloat16 each. On AMD's twice the threads share them.
WIDEST = 16
FULL = 1024
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}
_AMD_BYTES = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _tool(name: str, *options: str, cubin: bytes) -> str:
    """What a tool of the Triton wheel says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def missing_tools() -> list[str]:
    return [name for name in ("cuobjdump", "nvdisasm") if not (TOOLS / name).exists()]


def spills(program: CompiledKernel) -> list[str]:
    """Memory of a thread's own, which is where registers go that do not fit."""
    if "cubin" in program.asm:
        usage = _tool("cuobjdump", "-res-usage", cubin=program.asm["cubin"])
        counts = re.findall(r"(STACK|LOCAL):(\d+)", usage)
    else:
        counts = re.findall(r"\.((?:[vs]gpr_spill_count|private_segment_fixed_size)):\s+(\d+)", program.asm["amdgcn"])
    if len({name for name, _ in counts}) < 2:
        return ["the tools report no spills, and none of their absence"]
    return [f"{name} is {count}" for name, count in counts if int(count)]


#: The exponential of SiLU, which NVIDIA's hardware has to 2 units in the last place.
EXPONENTIAL = "ex2.approx.f32"


def approximations(program: CompiledKernel) -> list[str]:
    """Arithmetic that is not rounded to nearest."""
    if "ptx" in program.asm:
        return sorted(set(re.findall(r"\b\w+\.approx[\w.]*|\bdiv\.full[\w.]*", program.asm["ptx"])))
    # Correctly rounded forms are made of v_rcp, v_rsq and v_sqrt too: the calls tell. Division is exact there always.
    return sorted(set(re.findall(r"call.*@(llvm\.amdgcn\.(?:sqrt|rcp|log|exp2|sin|cos)[\w.]*)", program.asm["llir"])))


#: A load of a loop that is pipelined, which goes to shared memory: its address, and its bytes.
ASYNCHRONOUS = r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^\]]*\], *\[ *(%rd\d+)[^\]]*\], *(0x[\da-f]+|\d+)"


def _declared(program: CompiledKernel) -> list[tuple[str, int, str]]:
    """("load" or "store", elements or 0 for a scalar, element type) of each access of the kernel."""
    ttir = program.asm["ttir"]
    accesses = re.findall(r"\btt\.(load|store) .*? : (?:tensor<((?:\d+x)+))?!tt\.ptr<(\w+)", ttir)
    if len(accesses) != len(re.findall(r"\btt\.(?:load|store)\b", ttir)):
        raise NotImplementedError("an access is written as none before")
    sizes = [math.prod(map(int, shape.split("x")[:-1])) if shape else 0 for _, shape, _ in accesses]
    return [(kind, size, dtype) for (kind, _, dtype), size in zip(accesses, sizes)]


def _values(program: CompiledKernel) -> dict[str, tuple[str, str]]:
    """Operation and the rest of the line of each value in Triton's own IR."""
    found = re.findall(r"(%\w+) = (?:\")?([\w.]+)(?:\")?(.*)", program.asm["ttir"])
    return {name: (op, rest) for name, op, rest in found}


def _operands(rest: str) -> list[str]:
    return re.findall(r"%\w+", rest.split(" : ")[0])


def _tiles(program: CompiledKernel) -> list[tuple[str, int, int, str]]:
    """("load" or "store", number of the argument, elements or 0 for less than two rows and columns, element type) of
    each access to a tensor of two dimensions."""
    arguments = re.findall(r"(%\w+): ", program.asm["ttir"].split("tt.func", 1)[1].split("\n", 1)[0])
    values = _values(program)
    pattern = r"\btt\.(load|store) (%\w+).*? : tensor<(\d+)x(\d+)x!tt\.ptr<(\w+)"
    tiles = []
    for kind, pointer, rows, columns, dtype in re.findall(pattern, program.asm["ttir"]):
        while pointer not in arguments:
            pointer = _operands(values[pointer][1])[0]
        elements = int(rows) * int(columns) if min(int(rows), int(columns)) > 1 else 0
        tiles.append((kind, arguments.index(pointer), elements, dtype))
    return tiles


def _emitted_for(ptx: str) -> Iterator[tuple[str, int, int]]:
    """("load" or "store", number of the argument, bytes of a thread) of each access in PTX, whose address is followed
    back to the argument it is a sum with."""
    loads = re.findall(r"\bld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", ptx)
    roots = {register: {int(number)} for register, number in loads}
    adding = r"add\.[su]64|mad\.(?:wide\.[su]32|lo\.[su]64)|mov\.[bu]64|selp\.b64"
    sums = re.findall(rf"\b(?:{adding})\s+(%rd\d+), (.*);", ptx)
    grown = True
    while grown:
        grown = False
        for register, sources in sums:
            known = set().union(*(roots.get(source, set()) for source in re.findall(r"%rd\d+", sources)))
            if known - roots.get(register, set()):
                roots.setdefault(register, set()).update(known)
                grown = True
    pattern = r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b[^\[;]*\[ ?(%rd\d+)"
    for kind, vector, bits, register in re.findall(pattern, ptx):
        for argument in roots[register]:
            yield {"ld": "load", "st": "store"}[kind], argument, int(vector or 1) * int(bits) // 8
    for register, width in re.findall(ASYNCHRONOUS, ptx):
        for argument in roots[register]:
            yield "load", argument, int(width, 0)


def _narrow_tiles(program: CompiledKernel, exempt: tuple[str, ...]) -> list[str]:
    """The same for a program that has tiles. Beside them it reads parameters of their columns, of which each thread
    holds its own as it likes: on NVIDIA's GPUs accesses are told apart by the argument they belong to."""
    threads = program.metadata.num_warps * (32 if "ptx" in program.asm else 64)
    wanted: Counter[tuple[str, int]] = Counter()
    for kind, argument, elements, dtype in _tiles(program):
        share = elements // threads * _BYTES[dtype]
        if elements >= FULL and dtype not in exempt and ("ptx" in program.asm or share >= WIDEST):
            wanted[kind, argument] += max(share // WIDEST, 1)
    faults = []
    if "ptx" not in program.asm:
        for kind in "load", "store":
            found = sum(width == WIDEST for other, width in _emitted(program) if other == kind)
            needed = sum(count for (other, _), count in wanted.items() if other == kind)
            faults += [f"{found} {kind}s of {WIDEST} bytes, expected {needed}"] if found < needed else []
        return faults
    emitted = list(_emitted_for(program.asm["ptx"]))
    for (kind, argument), count in wanted.items():
        widths = [width for other, number, width in emitted if (other, number) == (kind, argument)]
        if len(widths) < count or set(widths) != {WIDEST}:
            faults.append(f"{kind}s of {widths} bytes for argument {argument}, expected {count} of {WIDEST}")
    return faults


def _emitted(program: CompiledKernel) -> Iterator[tuple[str, int]]:
    """("load" or "store", bytes of a thread) of each access of the machine program."""
    if "ptx" in program.asm:
        for kind, vector, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", program.asm["ptx"]):
            yield {"ld": "load", "st": "store"}[kind], int(vector or 1) * int(bits) // 8
        for _, width in re.findall(ASYNCHRONOUS, program.asm["ptx"]):
            yield "load", int(width, 0)
    else:
        pattern = r"\b(?:global|buffer|flat)_(load|store)_(?:[su]?(byte|short|dword(?:x\d)?))\w*"
        for kind, width in re.findall(pattern, program.asm["amdgcn"]):
            yield kind, _AMD_BYTES[width]


def narrow_accesses(program: CompiledKernel, exempt: tuple[str, ...] = ()) -> list[str]:
    """Accesses to tensors of fewer bytes than a thread's share of the tensor has, up to 16, or should have.

    exempt: element types that need not be accessed so. Pixels have small shares always.

    Scalars (noise levels, weights, indices) are a thread's one element each. A loop that is unrolled repeats accesses,
    so that more wide ones than the kernel declares are no fault.
    """
    if _tiles(program):
        return _narrow_tiles(program, exempt)
    threads = program.metadata.num_warps * (32 if "ptx" in program.asm else 64)
    faults = []
    for kind in "load", "store":
        wanted: Counter[int] = Counter()
        scalars: Counter[int] = Counter()
        strided = False
        for other, elements, dtype in _declared(program):
            share = max(elements // threads, 1) * _BYTES[dtype]
            if elements >= FULL and dtype != "i8" and "ptx" in program.asm:
                share = max(share, WIDEST)
            if other != kind:
                continue
            elif not elements:
                scalars[share] += 1
            elif dtype in exempt:
                strided = True
            else:
                wanted[min(share, WIDEST)] += max(share // WIDEST, 1)
        found = Counter(width for other, width in _emitted(program) if other == kind)
        for width, count in wanted.items():
            if found[width] < count:
                faults.append(f"{found[width]} {kind}s of {width} bytes, expected {count}")
        # Scalars side by side may be accessed together: where there is nothing else, nothing is narrow.
        for width in found.keys() - wanted.keys() if wanted else ():
            if found[width] > scalars[width] and not strided:
                faults.append(f"{found[width]} {kind}s of {width} bytes, {scalars[width]} of them of scalars")
    return faults


def narrow_in_sass(program: CompiledKernel) -> list[str]:
    """The same in the cubin: as many 16-byte accesses as the PTX has, and no more of others."""
    sass = _tool("nvdisasm", "-c", cubin=program.asm["cubin"])
    faults = []
    for kind, instruction in ("load", "LDG(?:STS)?"), ("store", "STG"):
        widths = [width for other, width in _emitted(program) if other == kind]
        found = re.findall(rf"\b{instruction}\.E\S*", sass)
        wide = sum(".128" in access for access in found)
        declared_wide = sum(width == WIDEST for width in widths)
        # Where the mask of a slab is known to be false, an access is left out.
        if wide < declared_wide and not _tiles(program):
            faults.append(f"{wide} {instruction}.E.128, and {declared_wide} {kind}s of 16 bytes in PTX")
        if len(found) - wide > len(widths) - declared_wide:
            faults.append(f"{len(found) - wide} narrow {instruction}, and {len(widths) - declared_wide} in PTX")
    return faults


_SUMS = ("arith.addi", "arith.subi", "arith.muli", "arith.shli")
_COPIES = ("tt.splat", "tt.expand_dims", "tt.broadcast")


def narrow_offsets(program: CompiledKernel) -> list[str]:
    """Offsets that 32 bits hold or pass through, and which so wrap at 2^31 elements.

    Two things need no 64 bits: the number of a program, and what is made of constants, ranges and a loop's counter.
    """
    ttir = program.asm["ttir"]
    values = _values(program)
    counters = set(re.findall(r"scf\.for (%\w+) =", ttir))

    def operands(name: str) -> list[str]:
        return _operands(values[name][1])

    def bounded(name: str) -> bool:
        if name in counters:
            return True
        op = values.get(name, ("argument", ""))[0]
        if op in _SUMS + _COPIES:
            return all(map(bounded, operands(name)))
        return op in ("arith.constant", "tt.make_range")

    def wraps(name: str) -> bool:
        op = values.get(name, ("argument", ""))[0]
        return any(map(wraps, operands(name))) if op in _COPIES else op in _SUMS and not bounded(name)

    faults = []
    for name, (op, rest) in values.items():
        if op == "tt.addptr":
            offset, kind = operands(name)[1], rest.split(" : ")[1]
            is_program = values.get(offset, ("argument", ""))[0] == "tt.get_program_id"
            if not re.search(r", (?:tensor<[\dx]+x)?i64\b", kind) and not (is_program or bounded(offset)):
                faults.append(f"{name} is a pointer plus 32 bits:{rest.split(' loc')[0]}")
        elif op in ("arith.extsi", "arith.extui") and wraps(operands(name)[0]):
            faults.append(f"{name} is made 64 bits wide after a sum of 32:{rest.split(' loc')[0]}")
    return faults


def float64(ttir: str) -> Counter[str]:
    """The operations on float64, but for those that make float32 of it at once, in Triton's IR as it is written."""
    found = re.findall(r"^ *(?:%\w+(?::\d+)? = )?\"?([\w.]+).*\bf64\b", ttir, re.M)
    return Counter(op for op in found if op not in ("tt.func", "tt.call", "arith.truncf"))


def instructions_per_element(program: CompiledKernel) -> float:
    """Instructions in the cubin for each element that a thread stores."""
    sass = _tool("nvdisasm", "-c", cubin=program.asm["cubin"])
    count = sum("NOP" not in line for line in re.findall(r"/\*[\da-f]{4,}\*/.*;", sass))
    elements = max(elements for kind, elements, _ in _declared(program) if kind == "store")
    return count / (elements // (32 * program.metadata.num_warps))


CHECKS: dict[str, Callable[[CompiledKernel], list[str]]] = {
    "spills": spills,
    "approximate arithmetic": approximations,
    "narrow accesses": narrow_accesses,
    "narrow offsets": narrow_offsets,
}
