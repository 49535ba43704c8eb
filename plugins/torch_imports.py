"""Importing transformers and diffusers without torch's compiler and torch's distributed tensors, on which they spend
half of the time.

They use neither until something is compiled or spread over several cards. What they want of the compiler when they are
imported is to mark functions for it. A module in its place notes the marks, and is replaced by the compiler, which is
told of them, as soon as anything else of it is asked for: 4.3 s became 2.3 (two busy cores of an EPYC).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

NAME = "torch._dynamo"
ALONE = f"{NAME}._trace_wrapped_higher_order_op"
"""The one module of the compiler that transformers imports. It needs no other of them."""

Function = Callable[..., Any]


class _Disabled:
    """A function that the compiler is to leave alone, once there is one."""

    def __init__(self, function: Function, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.call, self._given, self._named = function, given, named

    def tell(self, compiler: ModuleType) -> None:
        self.call = compiler.disable(self.call, *self._given, **self._named)


class _NeverMade:
    """In the place of what the compiler makes of a module, for those who ask whether a module is one."""


class CompilerLater(ModuleType):
    """Stands for `torch._dynamo` until something of it is used that is no mark."""

    eval_frame = SimpleNamespace(OptimizedModule=_NeverMade)

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(NAME)
        self.__spec__, self.__file__ = spec, spec.origin
        self.__path__ = list(spec.submodule_search_locations or ())
        self._marks: list[tuple[str, Function]] = []
        self._disabled: list[_Disabled] = []
        self._lock = threading.RLock()
        self._finder = _PartsFinder(self)

    def allow_in_graph(self, fn: Function) -> Function:
        """See `torch.compiler.allow_in_graph`."""
        self._marks.append(("allow_in_graph", fn))
        return fn

    def assume_constant_result(self, fn: Function) -> Function:
        """See `torch.compiler.assume_constant_result`."""
        self._marks.append(("assume_constant_result", fn))
        return fn

    def disable(self, fn: Any = None, *given: Any, **named: Any) -> Any:
        """See `torch.compiler.disable`."""
        if fn is None:
            return lambda decorated: self.disable(decorated, *given, **named)
        if not isinstance(fn, FunctionType):
            return self.real().disable(fn, *given, **named)
        held = _Disabled(fn, given, named)
        self._disabled.append(held)

        @wraps(fn)
        def called(*args: Any, **kwargs: Any) -> Any:
            return held.call(*args, **kwargs)

        return called

    def install(self) -> None:
        """Take the compiler's place."""
        sys.modules[NAME] = self
        sys.meta_path.insert(0, self._finder)

    def real(self) -> ModuleType:
        """The compiler, in its own place and told of all marks."""
        with self._lock:
            if sys.modules.get(NAME) is self:
                sys.meta_path.remove(self._finder)
                del sys.modules[NAME]
                self._tell(importlib.import_module(NAME))
            return importlib.import_module(NAME)

    def _tell(self, compiler: ModuleType) -> None:
        for mark, function in self._marks:
            getattr(compiler, mark)(function)
        for held in self._disabled:
            held.tell(compiler)
        if ALONE in sys.modules:
            setattr(compiler, ALONE.rpartition(".")[2], sys.modules[ALONE])

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self.real(), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        # A part that was asked for first is set on the module that stood here then.
        compiler = sys.modules.get(NAME)
        super().__setattr__(attribute, value) if compiler in (None, self) else setattr(compiler, attribute, value)


class _PartsFinder(MetaPathFinder):
    """Has the whole compiler imported before a part of it is."""

    def __init__(self, compiler: CompilerLater) -> None:
        self._compiler = compiler

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{NAME}."):
            return None
        if name == ALONE:
            return PathFinder.find_spec(name, path, target)
        alone = sys.modules.get(ALONE)
        if alone and getattr(alone.__spec__, "_initializing", False):
            del sys.modules[ALONE]  # it is what asks, half imported, and the compiler imports it, too
        self._compiler.real()
        there = sys.modules.get(name)
        return importlib.util.spec_from_loader(name, _ThereLoader(there)) if there else None


class _ThereLoader(Loader):
    """Loads a module that was imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def import_compiler_later() -> None:
    """From now on, torch's compiler is imported when it is used, unless it is there already."""
    spec = importlib.util.find_spec(NAME) if NAME not in sys.modules else None
    if spec:
        CompilerLater(spec).install()


@contextmanager
def without_distributed() -> Iterator[None]:
    """In the context, torch says that it was built without `torch.distributed`, unless somebody uses it."""
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        yield
        return
    told = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = told
