"""The house: imports point downwards, and each outside library has one door."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import JOBS
from lomo_kernels import ops
from lomo_kernels.ops import fake, native, reference, triton

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lomo_kernels"

# Room -> rooms it may import. A room is a module or a package of lomo_kernels.
MAY_IMPORT = {
    "_C": set(),
    "ops.reference": set(),
    "ops.triton": {"ops.reference"},
    "ops.native": {"_C"},
    "ops": {"ops.native", "ops.triton", "ops.reference"},
    "optim": {"ops"},
    "memory": {"integrations", "optim", "ops", "ops.native"},
    "integrations": {"optim"},
    "finetune": {"integrations", "memory", "optim", "ops"},
    "__main__": {"cli"},
    "cli": {"finetune", "integrations", "memory", "optim", "ops", "lomo_kernels"},
    "lomo_kernels": {"ops", "optim"},
}
# Library -> the only rooms that may import it.
DOORS = {
    "transformers": {"integrations"},
    "accelerate": {"integrations"},
    "peft": {"integrations"},
    "deepspeed": {"integrations"},
    "triton": {"ops.triton"},
    "rich": {"finetune", "cli"},
    "datasets": {"finetune"},
    "pyarrow": {"finetune"},
    "yaml": {"finetune"},
    "matplotlib": {"memory"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), path


def room_of(module):
    """lomo_kernels.ops.native -> ops.native; lomo_kernels.optim.lomo -> optim."""
    parts = module.split(".")[1:]
    if not parts or parts[0] == "__version__":
        return "lomo_kernels"
    dotted = ".".join(parts[:2])
    return dotted if dotted in MAY_IMPORT else parts[0]


def imports_of(module, path):
    """Absolute names of everything a module imports, in functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                yield f"{base}.{alias.name}"


@pytest.mark.parametrize(
    ("module", "path"), list(modules()), ids=lambda value: str(value).split("/")[-1]
)
def test_imports_point_downwards(module, path):
    room = room_of(module)
    assert room in MAY_IMPORT, f"{module} is in no room of the house"
    for name in imports_of(module, path):
        library = name.split(".")[0]
        if library == "lomo_kernels":
            assert room_of(name) in MAY_IMPORT[room] | {room}, f"{module} imports {name}"
        elif library in DOORS:
            assert room in DOORS[library], f"{module} imports {library}"


def test_bench_imports_itself_in_no_circle():
    """Imports inside functions, by which a circle could be broken, count as well."""
    imports = {}
    for path in (ROOT / "bench").glob("*.py"):
        names = (name.split(".") for name in imports_of(f"bench.{path.stem}", path))
        imports[path.stem] = {parts[1] for parts in names if parts[0] == "bench"}
    order = list(graphlib.TopologicalSorter(imports).static_order())
    assert order.index("llama") < order.index("strategies") < order.index("readme")


def test_shapes_of_bench_need_no_transformers():
    code = "import sys; import bench.shapes, bench.costs; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(("name", "contract"), ops.OPERATIONS.items(), ids=list(ops.OPERATIONS))
def test_the_files_of_an_operation_have_its_name(name, contract):
    assert contract.__module__ == f"lomo_kernels.ops.{name}"
    assert contract.__name__ in ops.__all__
    product = name.startswith("product_")  # made of matrix products, which C++ does not write anew
    files = [f"lomo_kernels/ops/triton/{name}.py", f"bench/bench_{name}.py", f"csrc/{name}.cuh"]
    missing = {f"bench/bench_{name}.py"} if name == "decide" else set()  # one block of 256 numbers
    missing |= {f"csrc/{name}.cuh"} if product else set()
    assert {file for file in files if not (ROOT / file).exists()} == missing
    assert (ROOT / f"python_tests/test_{contract.__name__.removesuffix('_')}.py").exists()
    columns = (triton,) if product else (triton, native, reference, fake)
    assert all(callable(getattr(column, contract.__name__)) for column in columns)


def test_every_bench_of_an_operation_is_run():
    benches = {name for name in ops.OPERATIONS if (ROOT / f"bench/bench_{name}.py").exists()}
    assert {job.__module__ for job in JOBS} >= {f"bench.bench_{name}" for name in benches}


def test_every_kernel_belongs_to_an_operation():
    shared = {"tables"}  # arguments and vectors
    assert {p.stem for p in (ROOT / "csrc").glob("*.cuh")} - shared <= ops.OPERATIONS.keys()
    shared = {"__init__", "common"}
    kernels = {p.stem for p in (PACKAGE / "ops" / "triton").glob("*.py")} - shared
    assert kernels == ops.OPERATIONS.keys()


def test_only_native_imports_the_extension_module():
    users = {
        module
        for module, path in modules()
        if any(name.split(".")[-1] == "_C" for name in imports_of(module, path))
    }
    assert users == {"lomo_kernels.ops.native"}


def test_kernels_know_no_torch_and_no_python():
    for path in (ROOT / "csrc").iterdir():
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if re.match(r"torch/|ATen/|c10/", name)], path
        if path.name != "bindings.cpp":
            assert not [name for name in includes if re.match(r"pybind11/|Python", name)], path


def test_every_skip_gives_its_reason():
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in ("pytest.skip", "pytest.xfail"):
                assert node.args, f"{path.name}:{node.lineno}"
            elif name in ("pytest.mark.skipif", "pytest.mark.skip"):
                assert any(k.arg == "reason" for k in node.keywords), f"{path.name}:{node.lineno}"


# Private names of the package and of bench that tests use all the same, and why.
PRIVATE = {
    "_C": "the extension module, which a test hands pointers that no tensor has",
    "_TORCH_TILE": "small tiles make small cases of many tiles",
    "_Watched": "calls are counted that nobody is told of",
    "_add_in_order": "the declared order of sums is the definition",
    "_arriving": "an event of a GPU that is not here",
    "_devices": "a device that is not here cannot be read at the end",
    "_load": "a rank loads its part of the model without a run",
}


def private_names(tree):
    """What a file defines under a name that begins with one underscore."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            name = node.id if isinstance(node, ast.Name) else node.attr
        else:
            continue
        if re.match("_[A-Za-z]", name):
            yield name


def test_no_test_reads_a_private_name_of_another_room():
    """As an attribute, by import, or as the text that monkeypatch takes."""
    rooms = [*PACKAGE.rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    defined = {name for path in rooms for name in private_names(ast.parse(path.read_text()))}
    # not what torch gives every tensor, nor a method of every named tuple
    defined = (defined | {"_C"}) - set(dir(torch.Tensor)) - {"_replace"}
    used = {}
    for path in Path(__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        own = set(private_names(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and "torch" not in ast.unparse(node.value):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
                names = [each.value for each in node.args if isinstance(each, ast.Constant)]
            else:
                continue
            for name in set(names) & defined - own:
                used[name] = f"{path.name}:{node.lineno}"
    assert used.keys() == PRIVATE.keys(), used


def test_importing_starts_nothing():
    """No GPU is touched, nothing is compiled or printed, and triton is not even loaded."""
    code = (
        "import sys, torch; import lomo_kernels; "
        "assert not torch.cuda.is_initialized(); "
        "assert not [m for m in ('triton', 'transformers', 'rich') if m in sys.modules]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
