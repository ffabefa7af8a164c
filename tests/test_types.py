"""Public functions say what they take and give, for editors and for mypy."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import helpers
import llama_reports


def public_functions():
    for package in (helpers, llama_reports):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("__main__"):
                continue
            module = importlib.import_module(info.name)
            for name, found in vars(module).items():
                if name.startswith("_") or getattr(found, "__module__", "") != info.name:
                    continue
                if inspect.isfunction(found):
                    yield f"{info.name}.{name}", found
                elif inspect.isclass(found):
                    for inner, method in vars(found).items():
                        written = inspect.isfunction(method) and method.__name__ == inner
                        if written and not inner.startswith("_"):
                            yield f"{info.name}.{name}.{inner}", method


# hooks of modules and what torch calls itself have the types that torch gives them
UNTYPED = {"forward", "backward"}


@pytest.mark.parametrize("name, function", [pytest.param(*f, id=f[0]) for f in public_functions()])
def test_a_public_function_is_annotated(name, function):
    if name.rpartition(".")[2] in UNTYPED:
        pytest.skip("its types are torch's")
    signature = inspect.signature(function)
    bare = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
    ]
    assert not bare
    assert signature.return_annotation is not signature.empty


def test_both_packages_tell_type_checkers_that_they_are_typed():
    for package in (helpers, llama_reports):
        assert (Path(package.__path__[0]) / "py.typed").is_file()
