"""The launches that a call makes, recorded instead of run, and the programs that Triton would compile for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, create_function_from_signature

import cmfast
from cmfast.ops import _dispatch


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, constexprs and options, as they reached Triton."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def program(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """What a target compiles. Types, alignment and ones are found by the binder of Triton's own launch."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, _ = bind(*self.arguments, **self.options)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.options, bound, specialization, self.options
        )
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__

    def inductors_program(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """What inductor compiles: floats are float64, and a whole number that is 1 is a constant. So is here each that
        `do_not_specialize` names, which inductor does not look at. No argument is known to be aligned."""
        source, options = self.program(target)
        signature, constants = dict(source.signature), dict(source.constants)
        for number, parameter in enumerate(self.kernel.params):
            if signature[parameter.name] == "fp32":
                signature[parameter.name] = "fp64"
            elif parameter.do_not_specialize and signature[parameter.name].startswith("i"):
                signature[parameter.name] = "constexpr"
                constants[number,] = 1
        return ASTSource(self.kernel, signature, constants, {}), options

    def key(self, target: GPUTarget) -> tuple[Any, ...]:
        """Equal for launches that share a program."""
        source, options = self.program(target)
        return source.hash(), str(sorted(options.items())), str(target)

    def compile(self, target: GPUTarget) -> CompiledKernel:
        source, options = self.program(target)
        return triton_compile(source, target=target, options=options)

    @property
    def named(self) -> dict[str, Any]:
        """The arguments and constexprs by name."""
        given = dict(zip(self.kernel.arg_names, self.arguments)) | self.options
        return {name: given[name] for name in self.kernel.arg_names}


def ttir(source: ASTSource, options: dict[str, Any], target: GPUTarget) -> str:
    """Triton's own IR of a program as it is written: nothing is inlined, folded or left out."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators = backend.get_codegen_implementation(parsed)
    return str(source.make_ir(target, parsed, generators, backend.get_module_map(), context))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """A list that launches are put into; none runs, and results keep whatever lay in memory."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """The launches of operations on CPU tensors, which take their kernels here."""
    with (
        recording() as launches,
        mock.patch.object(_dispatch, "device_refusal", lambda device: None),
        cmfast.backend("triton"),
    ):
        call()
    return launches
