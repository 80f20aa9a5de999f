"""Which source files a function can reach, by name: the function's own names, theirs in turn, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("svd", "evaluation")
Symbol = tuple[str, str]  # module and name in it; "" is the whole module


def file_of(symbol: Symbol) -> str:
    """The file of a symbol, relative to the project."""
    return f"{symbol[0].replace('.', '/')}.py"


def module_file(module: str) -> Path | None:
    """The file of one of our modules; None for other people's, and for packages."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path if module.split(".")[0] in PACKAGES and path.is_file() else None


def imported(node: ast.AST) -> Iterator[tuple[str, Symbol]]:
    """The names that an import binds, with what they stand for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0], (alias.name, "")
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            target = (whole, "") if module_file(whole) else (node.module, alias.name)
            yield alias.asname or alias.name, target


@cache
def parts(module: str) -> tuple[dict[str, list[ast.AST]], dict[str, Symbol]]:
    """The top-level definitions and the imports of a module by name; statements that define nothing are under ""."""
    path = module_file(module)
    assert path is not None
    definitions: dict[str, list[ast.AST]] = {}
    imports: dict[str, Symbol] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= dict(imported(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            definitions.setdefault(node.name, []).append(node)
        else:
            stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            for name in stored or {""}:
                definitions.setdefault(name, []).append(node)
    return definitions, imports


def uses(module: str, node: ast.AST) -> Iterator[Symbol]:
    """What a piece of a module refers to, in this module and in others."""
    definitions, imports = parts(module)
    local = imports | {name: symbol for part in ast.walk(node) for name, symbol in imported(part)}
    for part in ast.walk(node):
        if isinstance(part, ast.Import | ast.ImportFrom):
            yield from (symbol for _, symbol in imported(part))
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in local:
            owner, name = local[part.value.id]
            yield (owner, name or part.attr)
        elif isinstance(part, ast.Name) and part.id in local and local[part.id][1]:
            yield local[part.id]
        elif isinstance(part, ast.Name) and part.id in definitions:
            yield module, part.id


def reachable(module: str, function: str, skip: frozenset[str] = frozenset()) -> set[str]:
    """Files, relative to the project, that can take part when `function` of `module` runs; what only a file in `skip`
    needs isn't followed.
    """
    waiting, seen = [(module, function)], set()
    while waiting:
        symbol = waiting.pop()
        if symbol in seen or module_file(symbol[0]) is None or file_of(symbol) in skip:
            continue
        seen.add(symbol)
        definitions, imports = parts(symbol[0])
        if symbol[1] in imports:  # a name that is handed on
            waiting.append(imports[symbol[1]])
        nodes = [*definitions.get(symbol[1], []), *definitions.get("", [])]
        waiting += [used for node in nodes for used in uses(symbol[0], node)]
    return {file_of(symbol) for symbol in seen}


def data_files(files: set[str]) -> set[str]:
    """What stands beside these files, is no code, and is named in them."""
    found = set()
    for file in files:
        folder = (ROOT / file).parent
        texts = {n.value for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.Constant)}
        beside = {path for path in folder.iterdir() if path.suffix != ".py" and not path.name.startswith((".", "__"))}
        packages = {path for path in beside if (path / "__init__.py").exists()}
        found |= {(path.relative_to(ROOT)).as_posix() for path in beside - packages if path.name in texts}
    return found
