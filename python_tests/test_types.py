"""What type checkers read of the package is true."""

import ast
import inspect
import re
import typing
from pathlib import Path

import cuda_on_cpu
import pytest

import lomo_kernels
from lomo_kernels import _C, finetune, memory, ops, optim
from lomo_kernels.ops import annotations as of_ops
from lomo_kernels.ops import product_update
from lomo_kernels.optim import annotations as of_optim
from lomo_kernels.optim import arguments

PACKAGE = Path(lomo_kernels.__file__).parent


def described():
    """Name -> names of its arguments, None for what is no function, as _C.pyi has it."""
    for node in ast.parse((PACKAGE / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, [each.arg for each in node.args.args]
        else:
            yield node.target.id, None


def there(extension):
    """The same, as the module has it: pybind11 writes a signature into the docstring."""
    for name, value in vars(extension).items():
        if not name.startswith("__"):
            found = re.findall(r"(\w+): [a-z]", (value.__doc__ or "").split("\n")[0])
            yield name, found if callable(value) else None


def test_the_extension_module_is_as_described():
    stub, module = dict(described()), dict(there(_C))
    if "cuda_lomo_update" not in module:  # built without CUDA: the same file, compiled with it
        module = dict(there(cuda_on_cpu.module()))
    assert len(module) > 15
    assert stub == module


def signatures(module):
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if inspect.isfunction(value):
            yield name, value
            continue
        for method, function in inspect.getmembers(value, inspect.isfunction):
            ours = function.__module__.startswith("lomo_kernels")
            if ours and (method == "__init__" or not method.startswith(("_", "on_"))):
                yield f"{name}.{method}", function


FUNCTIONS = [
    pytest.param(function, id=f"{module.__name__}.{name}")
    for module in (ops, optim, memory, finetune)
    for name, function in signatures(module)
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_functions_have_types(function):
    hints = typing.get_type_hints(function)
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    assert set(names) <= hints.keys()
    assert "return" in hints or function.__name__ == "__init__"


def test_the_names_that_arguments_take_are_those_that_are_checked():
    assert typing.get_args(of_ops.Backend) == ("auto", *ops.BACKENDS)
    assert set(typing.get_args(of_ops.Rounding)) == set(ops.ROUNDINGS)
    assert typing.get_args(of_ops.Method) == product_update.METHODS
    assert typing.get_args(of_optim.Rounding) == ("auto", *typing.get_args(of_ops.Rounding))
    assert typing.get_args(of_optim.Norm) == arguments.NORMS
    assert typing.get_args(of_optim.Strategy) == arguments.STRATEGIES


def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").exists()
