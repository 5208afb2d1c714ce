"""Write `expo/__init__.pyi`, which tells editors and type checkers what the functions of the package take and return.

    python tools/make_stub.py [--check]

They are made of the settings while the program runs (`expo/api.py`), where no editor can look. `--check` writes
nothing, and exits with 1 where the file is not what would be written.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import expo
from expo import api

STUB = Path(expo.__file__).with_suffix(".pyi")
HEAD = '"""Made by tools/make_stub.py of the settings in expo/config/: change these."""'


def stub() -> str:
    """The content of the file, formatted."""
    imports = [
        "from collections.abc import Iterable",
        "from os import PathLike",
        "from typing import Any, Literal, overload",
        *_imports_of_results(),
        "from expo.errors import EnvironmentFailure, ExpoError, InputError, MissingExtra",
        "from expo.recipes import Recipe, RewardRecipe",
    ]
    names = [name for name, place in expo.PLACES.items() if place == api.__name__]
    functions = [text for name in names for text in _function(name, getattr(api, name))]
    listed = f"__all__ = {sorted(expo.__all__)!r}"
    source = "\n\n".join([HEAD, "\n".join(imports), listed, "__version__: str", *functions])
    for command in (["check", "--fix", "--select", "I,RUF022"], ["format"]):
        words = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(STUB), "-"]
        source = subprocess.run(words, input=source, capture_output=True, text=True, check=True).stdout
    return source


def _imports_of_results() -> list[str]:
    """The imports of the classes that the functions return."""
    tree = ast.parse(Path(api.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    return [ast.unparse(line) for block in blocks for line in block.body]


def _function(name: str, function: Callable[..., Any]) -> list[str]:
    """A function; twice where its result depends on `dry_run`."""
    signature = inspect.signature(function)
    body = textwrap.indent(f'"""{function.__doc__.strip()}\n"""', "    ") if function.__doc__ else "    ..."
    if "dry_run" not in signature.parameters:
        return [f"def {name}{_written(signature)}:\n{body}"]
    planned = signature.parameters["dry_run"].replace(annotation="Literal[True]", default=Parameter.empty)
    plan = _with(signature, planned).replace(return_annotation="dict[str, Any]")
    done = _with(signature, signature.parameters["dry_run"].replace(annotation="Literal[False]"))
    return [f"@overload\ndef {name}{_written(plan)}: ...", f"@overload\ndef {name}{_written(done)}:\n{body}"]


def _with(signature: Signature, changed: Parameter) -> Signature:
    return signature.replace(
        parameters=[changed if one.name == changed.name else one for one in signature.parameters.values()]
    )


def _written(signature: Signature) -> str:
    """The signature as source, whose annotations are source already."""
    words = []
    for one in signature.parameters.values():
        if one.kind is Parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        star = "*" if one.kind is Parameter.VAR_POSITIONAL else ""
        default = "" if one.default is Parameter.empty else f" = {one.default!r}"
        words.append(f"{star}{one.name}: {one.annotation}{default}")
    return f"({', '.join(words)}) -> {signature.return_annotation}"


def main() -> int:
    """Write the file, or check it."""
    wanted = stub()
    if "--check" not in sys.argv:
        STUB.write_text(wanted, encoding="utf-8")
        return 0
    if STUB.is_file() and STUB.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{STUB} is not what the settings say: run `python tools/make_stub.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
