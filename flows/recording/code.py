"""The code of a stage by its meaning: a digest that changes when something changes that can change the result.

A stage's code is what its function can reach by name: the names in its body, theirs in turn, and what they import. The
digest is made from the syntax trees of the files found so, without docstrings; comments and formatting aren't in a
syntax tree. So editing a comment in a callback trains nothing again, and editing `svd/training/lora.py` trains again
only what can reach it. Annotations count, because Triton, pydantic and dataclasses read them.

Data files that the code names (templates, baselines) count by their bytes. `WITHOUT_EFFECT` lists what is left out.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from flows.stages import STAGES, Stage
from svd.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the code that runs, which may be another folder than the project's
PACKAGES = ("svd", "evaluation")
# Modules and packages that the search doesn't enter, each with the reason why it can't change a result.
WITHOUT_EFFECT = {
    "svd.config": "the values of options are watched by DVC, and defaults by the inventory",
    "svd.core": "errors, locks, atomic writing, trying again: they refuse or move bytes and make none",
    "svd.storage": "brings bytes from and to where they lie; what was read is checked by size and hash",
    "svd.stage": "the contract between stages and their runner; publishing renames folders",
    "svd.training.launch": "starts the processes of a training; the result doesn't depend on their number",
    "svd.training.card_contents": "what a model card says; no weight depends on it",
    "svd.training.model_card": "how a model card is written; no weight depends on it",
    "svd.training.profiling": "traces what some steps cost; no weight depends on it",
    "svd.training.ranks": "lets the processes of a launcher wait for one another",
    "svd.training.samples": "previews for people during a training; no weight depends on them",
    "svd.training.speed": "metrics of speed and memory for the tracker; batches pass through it as they are",
}
_MODULE = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+)+(:\w+)?")
_EVERYTHING = "*"


@dataclass(frozen=True)
class Symbol:
    """A name in one of our modules; "" is what runs when the module is imported, "*" the whole module."""

    module: str
    name: str


@dataclass(frozen=True)
class Parsed:
    """The text of a file, parsed: its tree without docstrings, all strings in it, and the tree as bytes."""

    tree: ast.Module
    strings: frozenset[str]
    meaning: bytes


@dataclass
class Module:
    """A parsed file with its top-level definitions by name, and what imported names mean in it.

    Top-level statements that define nothing are under "".
    """

    parsed: Parsed
    definitions: dict[str, list[ast.AST]] = field(default_factory=dict)
    imports: dict[str, Symbol] = field(default_factory=dict)


class Code:
    """The packages below `root`, each file parsed once."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._modules: dict[str, Module] = {}
        self._digests: dict[str, bytes] = {}
        self._known: dict[Symbol, list[Symbol]] = {}

    def file_of(self, module: str) -> str | None:
        """Return the file of one of our modules or packages, relative to the root; None for other people's."""
        stem = module.replace(".", "/")
        if module.split(".")[0] not in PACKAGES:
            return None
        return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if (self.root / name).is_file()), None)

    def reach(self, function: str, skip: frozenset[str] = frozenset(WITHOUT_EFFECT)) -> set[str]:
        """Return the files that can take part when `function` (`module:function`) runs, relative to the root.

        skip: modules and packages that aren't entered; what only they need isn't followed.
        """
        module, _, name = function.partition(":")
        waiting, seen = [Symbol(module, name)], set[Symbol]()
        while waiting:
            symbol = waiting.pop()
            if symbol in seen or self.file_of(symbol.module) is None or _skipped(symbol.module, skip):
                continue
            seen.add(symbol)
            if symbol not in self._known:
                self._known[symbol] = list(self._needs(symbol))
            waiting += self._known[symbol]
        files = {str(self.file_of(symbol.module)) for symbol in seen}
        return {file for file in files if self._module(file).parsed.tree.body}

    def data_files(self, files: set[str]) -> set[str]:
        """Return the files of the packages that are no code and that a string in `files` names, or names a folder of.

        Example: `"style.css"` names evaluation/pages/style.css, and so does `"pages"`.
        """
        texts = {text for file in files for text in self._module(file).parsed.strings}
        return {name for name in self._data() if texts & self._names(Path(name))}

    def digest(self, function: str) -> str:
        """Return the digest (SHA-256, hexadecimal) of all that `function` can reach."""
        files = self.reach(function)
        total = hashlib.sha256()
        for file in sorted(files | self.data_files(files)):
            total.update(f"{file}\n".encode() + self._digest(file))
        return total.hexdigest()

    def _digest(self, file: str) -> bytes:
        if file not in self._digests:
            code = file.endswith(".py")
            content = _parsed(self._text(file)).meaning if code else (self.root / file).read_bytes()
            self._digests[file] = hashlib.sha256(content).digest()
        return self._digests[file]

    def _data(self) -> Iterator[str]:
        for package in PACKAGES:
            for path in (self.root / package).rglob("*"):
                relative = path.relative_to(self.root)
                hidden = any(part.startswith((".", "__")) for part in relative.parts)
                if path.is_file() and path.suffix not in (".py", ".pyc") and not hidden:
                    yield relative.as_posix()

    def _names(self, path: Path) -> set[str]:
        """Return the name of a data file and those of the folders around it that are no packages."""
        folders = [folder for folder in path.parents if not (self.root / folder / "__init__.py").is_file()]
        return {path.name, *(folder.name for folder in folders)} - {""}

    def _text(self, file: str) -> str:
        return (self.root / file).read_text(encoding="utf-8")

    def _module(self, file: str) -> Module:
        if file not in self._modules:
            module = Module(_parsed(self._text(file)))
            for node in module.parsed.tree.body:
                self._index(module, node)
            self._modules[file] = module
        return self._modules[file]

    def _index(self, module: Module, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            module.definitions.setdefault(node.name, []).append(node)
            return
        module.imports |= dict(pair for part in ast.walk(node) for pair in self._imported(part))
        if not isinstance(node, ast.Import | ast.ImportFrom):
            stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            for name in stored or {""}:
                module.definitions.setdefault(name, []).append(node)

    def _imported(self, node: ast.AST) -> Iterator[tuple[str, Symbol]]:
        """Yield the names that an import binds, with what they stand for."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, Symbol(alias.name, "")) if alias.asname else _first(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = Symbol(whole, "") if self.file_of(whole) else Symbol(node.module, alias.name)
                yield alias.asname or alias.name, target

    def _needs(self, symbol: Symbol) -> Iterator[Symbol]:
        """Yield what a symbol refers to directly, and the packages around its module, which are imported first."""
        parents = symbol.module.split(".")[:-1]
        yield from (Symbol(".".join(parents[: n + 1]), "") for n in range(len(parents)))
        module = self._module(str(self.file_of(symbol.module)))
        if symbol.name in module.imports:  # a name that is handed on
            yield module.imports[symbol.name]
        names = [*module.definitions] if symbol.name == _EVERYTHING else [symbol.name, ""]
        for node in (node for name in names for node in module.definitions.get(name, [])):
            yield from _Uses(self, symbol.module, module).find(node)


class _Uses(ast.NodeVisitor):
    """Collects what a piece of a module refers to, in this module and in others."""

    def __init__(self, code: Code, name: str, module: Module) -> None:
        self._code, self._name, self._module = code, name, module
        self._found: list[Symbol] = []

    def find(self, node: ast.AST) -> list[Symbol]:
        """Return the symbols that `node` refers to; imports inside it count from its beginning."""
        inner = (pair for part in ast.walk(node) for pair in self._code._imported(part))
        self._local = self._module.imports | dict(inner)
        self.visit(node)
        return self._found

    def visit_Import(self, node: ast.Import) -> None:
        """Count an import inside a function: the module runs."""
        self._found += [Symbol(alias.name, "") for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Count the names that are imported inside a function."""
        self._found += [symbol for _, symbol in self._code._imported(node)]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Follow `module.name`, also over several packages; whatever else has attributes is walked through."""
        names, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            names, value = [value.attr, *names], value.value
        start = self._local.get(value.id) if isinstance(value, ast.Name) else None
        if start is None or start.name:
            self.generic_visit(node)
            return
        module = start.module
        while len(names) > 1 and self._code.file_of(f"{module}.{names[0]}"):
            module = f"{module}.{names.pop(0)}"
        self._found.append(Symbol(module, names[0]))

    def visit_Name(self, node: ast.Name) -> None:
        """Follow a name; a module that is handed on as a value counts as a whole."""
        if node.id in self._local:
            symbol = self._local[node.id]
            self._found.append(symbol if symbol.name else Symbol(symbol.module, _EVERYTHING))
        elif node.id in self._module.definitions:
            self._found.append(Symbol(self._name, node.id))

    def visit_Constant(self, node: ast.Constant) -> None:
        """Follow a module that is named in a string, as in `python -m svd.orbits.render` or a table of classes."""
        if isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            module, _, name = node.value.partition(":")
            self._found.append(Symbol(module, name or _EVERYTHING))


def _parse(text: str) -> ast.Module:
    """Parse a source file; again when another thread parsed one meanwhile, which CPython 3.11 takes for an error.

    Its check of the recursion depth is shared by all threads (gh-106905), and Prefect runs several.
    """
    for _ in range(9):
        with suppress(SystemError):
            return ast.parse(text)
    return ast.parse(text)


@cache
def _parsed(text: str) -> Parsed:
    tree = _without_docstrings(_parse(text))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return Parsed(tree, frozenset(c for c in constants if isinstance(c, str)), "".join(_dump(tree)).encode())


def _first(module: str) -> tuple[str, Symbol]:
    """Return what `import a.b.c` binds: `a`."""
    top = module.split(".")[0]
    return top, Symbol(top, "")


def _skipped(module: str, skip: frozenset[str]) -> bool:
    return any(module == entry or module.startswith(f"{entry}.") for entry in skip)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove docstrings, and the imports that only a type checker sees."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
            node.body = [part for part in node.body if not _for_type_checkers(part)]
    return tree


def _for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _dump(node: object) -> Iterator[str]:
    """Yield a syntax tree as text, without empty fields, which differ between versions of Python."""
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if value is not None and value != [] and name not in ("kind", "type_comment"):
                yield f"{name}="
                yield from _dump(value)
        yield ")"
    elif isinstance(node, list):
        for item in node:
            yield from _dump(item)
            yield ","
    else:
        yield repr(node)


@cache
def _installed() -> Code:
    return Code()


def code_digest(stage: Stage) -> str:
    """Return the digest of the code that makes the output of `stage`, as it lies beside this module."""
    return _installed().digest(stage.function)


def stages_reaching(file: Path, root: Path = ROOT) -> list[Stage]:
    """Return the stages whose digest counts `file`, as a whole; raises UserError for no file of the code."""
    code = Code(root)
    path = file.resolve()
    if not (path.is_file() and path.is_relative_to(root) and path.relative_to(root).parts[0] in PACKAGES):
        raise UserError(f"{file}: no file of {' or '.join(f'{root / package}' for package in PACKAGES)}")
    name = path.relative_to(root).as_posix()
    reached = ((stage, code.reach(stage.function)) for stage in STAGES.values())
    return [stage for stage, files in reached if name in files | code.data_files(files)]


def packages_digest(root: Path = ROOT) -> str | None:
    """Return the digest of the versions in requirements.lock beside the code; None where there is no such file.

    Only names and versions count: a hash that was added for another platform changes nothing.
    """
    path = root / "requirements.lock"
    if not path.is_file():
        return None
    pins = sorted(re.findall(r"^\S+==\S+", path.read_text(encoding="utf-8"), re.MULTILINE))
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()
