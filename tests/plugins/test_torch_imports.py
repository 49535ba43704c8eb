"""torch's compiler, imported when it is used: it knows all that it was told before. In processes of their own, as here
it was imported long ago."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGINNING = """
import sys, importlib
import torch
from autoflux.plugins import torch_imports
assert "torch._dynamo" not in sys.modules
torch_imports.import_compiler_later()

def is_real():
    return "torch._dynamo.convert_frame" in sys.modules

def compiled(function, **options):
    seen = []
    def backend(graph, inputs):
        seen.append([node.name for node in graph.graph.nodes])
        return graph.forward
    return torch.compile(function, backend=backend, **options), seen
"""


def run(script: str) -> str:
    ran = subprocess.run([sys.executable, "-c", BEGINNING + script], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_libraries_come_without_it():
    run("""
import autoflux.plugins.diffusers_loading
from autoflux.plugins.diffusers_pipeline import DiffusersPipeline
assert not is_real()
assert "torch.distributed.tensor" not in sys.modules
assert torch.distributed.is_available(), "that was said for the imports only"
""")


def test_marked_functions_are_known_to_it():
    run("""
@torch.compiler.allow_in_graph
def kept_whole(x):
    print("called")
    return x + 1

@torch._dynamo.assume_constant_result
def constant():
    return len(sys.modules) > 0

@torch.compiler.disable
def left_alone(x):
    assert not torch.compiler.is_compiling()
    return x * 2

@torch.compiler.disable(recursive=False)
def left_alone_too(x):
    return x * 3

assert left_alone(2) == 4 and left_alone_too(2) == 6
assert left_alone.__name__ == "left_alone"
assert not is_real()

def both(x):
    return kept_whole(x) if constant() else x

function, seen = compiled(both, fullgraph=True)
assert function(torch.ones(2)).tolist() == [2, 2]
assert is_real()
assert len(seen) == 1 and "kept_whole" in str(seen)

function, seen = compiled(lambda x: left_alone(x + 1) + 1)
assert function(torch.ones(2)).tolist() == [5, 5]
assert len(seen) == 2, "the graph breaks where it is called"
try:
    compiled(lambda x: left_alone(x), fullgraph=True)[0](torch.ones(2))
except Exception as error:
    assert "left_alone" in str(error) or "disable" in str(error)
else:
    raise AssertionError("it was compiled")
assert left_alone_too(2) == 6
""")


@pytest.mark.parametrize(
    "used",
    [
        "torch._dynamo.config.recompile_limit",
        "torch._dynamo.reset()",
        "from torch._dynamo import config; config.recompile_limit",
        "import torch._dynamo.utils; torch._dynamo.utils.counters",
        "from torch._dynamo.utils import counters",
        "import torch._dynamo.backends.debugging as d; d.eager; torch._dynamo.backends.debugging.eager",
        "import torch._inductor.config",
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1))",
        "torch.compiler.reset()",
        "torch.compiler.disable(torch.nn.Linear(2, 2))",
    ],
)
def test_whatever_is_asked_for_is_the_real_one(used):
    run(f"""
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
assert not is_real()
standing = sys.modules["torch._dynamo"]
{used}
if is_real():
    import torch._dynamo
    assert sys.modules["torch._dynamo"] is torch._dynamo is not standing
    assert type(torch._dynamo).__name__ == "module"
    assert standing.config is torch._dynamo.config, "who holds what stood there gets it, too"
    assert torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex is TransformGetItemToIndex
    assert not any(type(finder).__name__ == "_PartsFinder" for finder in sys.meta_path)
    for name, module in list(sys.modules.items()):
        if name.startswith("torch._dynamo") and module.__spec__:
            assert module.__spec__.name == name, name
            assert not type(module.__spec__.loader).__name__.startswith("_There"), name
else:
    assert "inductor" in {used!r}
function = torch.compile(lambda x: torch.sin(x) + 1, backend="eager", fullgraph=True)
assert function(torch.zeros(2)).tolist() == [1, 1]
""")


def test_no_module_is_taken_for_a_compiled_one():
    run("""
from diffusers.utils.torch_utils import is_compiled_module
module = torch.nn.Linear(2, 2)
assert not is_compiled_module(module)
assert not is_real()
made = torch.compile(module, backend="eager")
assert is_compiled_module(made) and not is_compiled_module(module)
""")


def test_it_is_left_where_it_is_there_already():
    run("""
import torch._dynamo
real = sys.modules.pop("torch._dynamo")
real = importlib.import_module("torch._dynamo") if real.__class__.__name__ != "module" else real
sys.modules["torch._dynamo"] = real
torch_imports.import_compiler_later()
assert sys.modules["torch._dynamo"] is real
""")


def test_threads_that_use_it_at_once_get_the_same():
    run("""
import threading
found, errors = [], []

def use(number):
    try:
        found.append(torch._dynamo.config if number % 2 else importlib.import_module("torch._dynamo.utils").counters)
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert not errors and not any(thread.is_alive() for thread in threads), errors
assert len({id(x) for x in found}) == 2
""")


def test_torch_is_without_distributed_only_where_nobody_uses_it(monkeypatch):
    run("""
with torch_imports.without_distributed():
    assert not torch.distributed.is_available()
assert torch.distributed.is_available()
try:
    with torch_imports.without_distributed():
        raise RuntimeError
except RuntimeError:
    assert torch.distributed.is_available()
torch.distributed.is_initialized = lambda: True
with torch_imports.without_distributed():
    assert torch.distributed.is_available()
""")
