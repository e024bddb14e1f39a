"""Cut code out of this repository into one file that needs nothing of it.

A file of an exported folder is not written a second time by hand: beginning with the definitions of
one module, everything they use is copied, word for word, from where it is defined here. What
nothing uses is left out.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "data_tools", "training")
NOT_COPIED = 'raise NotImplementedError("not part of this export")'
DIGEST_DIGITS = 8

Key = tuple[str, str]  # module, name


@dataclass(frozen=True)
class _Definition:
    """A top-level statement of a module and the names that it uses."""

    text: str
    uses: frozenset[str]
    line: int


@dataclass(frozen=True)
class _Module:
    definitions: dict[str, _Definition]  # by every name that the statement binds
    ours: dict[str, Key]  # names imported from this repository
    others: dict[str, str]  # names imported from elsewhere, with the statement


def bundle(module: str) -> str:
    """Return the text of one file with the definitions of a module and all that they use.

    Args:
        module: such as "training.exports.hub_code.pipeline".
    """
    reached = _reached(module)
    owners: dict[str, str] = {}
    for owner, name in reached:
        other = owners.setdefault(name, owner)
        assert other == owner, f"{name} is defined in {other} and in {owner}; rename one of them"
    imports, body = set(), []
    for owner in _in_order_of_use({key[0] for key in reached}):
        source = _read(owner)
        names = {name for where, name in reached if where == owner}
        wanted = {source.definitions[name] for name in names if name in source.definitions}
        for definition in wanted:
            imports |= {source.others[name] for name in definition.uses if name in source.others}
        body.append(f"# From {owner.replace('.', '/')}.py")
        body += [part.text for part in sorted(wanted, key=lambda definition: definition.line)]
    head = ast.get_docstring(_tree(module), clean=False).split("\n")[0]
    note = "Generated from the training program; all of its definitions are copies of that code."
    return "\n\n\n".join([f'"""{head}\n\n{note}\n"""', _joined_imports(imports), *body]) + "\n"


def file_name(stem: str, text: str) -> str:
    """Name a module file after its content.

    diffusers imports the code of all local folders under their bare file names: a second folder's
    file of the same name would replace the functions of a model that is already loaded.
    """
    return f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]}"


def _reached(module: str) -> set[Key]:
    """Follow the names that definitions use, from all of a module's, to where they are defined."""
    waiting = [(module, name) for name in _read(module).definitions]
    found: set[Key] = set()
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        source = _read(key[0])
        for name in source.definitions[key[1]].uses:
            if name in source.definitions:
                waiting.append((key[0], name))
            elif name in source.ours:
                waiting.append(source.ours[name])
    return found


def _in_order_of_use(modules: set[str]) -> Iterator[str]:
    """Yield modules so that each comes after those that it imports from."""
    done: set[str] = set()

    def visit(module: str) -> Iterator[str]:
        if module in done:
            return
        done.add(module)
        for owner in sorted({owner for owner, _ in _read(module).ours.values()}):
            if owner in modules:
                yield from visit(owner)
        yield module

    for module in sorted(modules):
        yield from visit(module)


def _path(module: str) -> Path:
    return REPOSITORY / (module.replace(".", "/") + ".py")


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


@functools.cache
def _read(module: str) -> _Module:
    lines = _path(module).read_text(encoding="utf-8").splitlines()
    definitions: dict[str, _Definition] = {}
    ours: dict[str, Key] = {}
    others: dict[str, str] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(node, ours, others)
            continue
        if isinstance(node, ast.If | ast.Expr):  # imports for type checkers, docstrings
            continue
        definition = _Definition(_text_of(node, lines), _names_in(node), node.lineno)
        for name in _bound_by(node):
            definitions[name] = definition
    return _Module(definitions, ours, others)


def _note_import(
    node: ast.Import | ast.ImportFrom, ours: dict[str, Key], others: dict[str, str]
) -> None:
    for alias in node.names:
        bound = alias.asname or alias.name.split(".")[0]
        as_name = f" as {alias.asname}" if alias.asname else ""
        if isinstance(node, ast.Import):
            others[bound] = f"import {alias.name}{as_name}"
        elif _is_ours(node):
            assert alias.asname is None, f"{alias.name} is imported under another name"
            ours[bound] = (node.module, alias.name)
        else:
            others[bound] = f"from {node.module} import {alias.name}{as_name}"


def _is_ours(node: ast.ImportFrom) -> bool:
    return node.module.split(".")[0] in PACKAGES


def _bound_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [part for target in targets for part in ast.walk(target)]
    return [part.id for part in names if isinstance(part, ast.Name)]


def _names_in(node: ast.stmt) -> frozenset[str]:
    return frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name))


def _text_of(node: ast.stmt, lines: list[str]) -> str:
    """Return a statement's lines and the comment above it.

    Where a function imports more of this repository when it gets there, the copy ends.
    """
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    taken = lines[first : node.end_lineno]
    for part in ast.walk(node):
        body = getattr(part, "body", [])
        for inner in body if isinstance(body, list) else []:
            if isinstance(inner, ast.ImportFrom) and _is_ours(inner):
                start, end = inner.lineno - 1 - first, body[-1].end_lineno - first
                taken[start:end] = [" " * inner.col_offset + NOT_COPIED]
                return "\n".join(taken)
    return "\n".join(taken)


def _joined_imports(statements: set[str]) -> str:
    """Put `import x` before `from x import y, z`."""
    plain = sorted(line for line in statements if line.startswith("import "))
    names: dict[str, list[str]] = {}
    for line in sorted(statements.difference(plain)):
        module, name = line.split(" import ")
        names.setdefault(module, []).append(name)
    return "\n".join(plain + [f"{module} import {', '.join(of)}" for module, of in names.items()])
