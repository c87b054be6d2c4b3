"""The fingerprint of a notebook: it tells whether its committed outputs are older than the code that made them.

sha256 over the notebook's code cells and over the modules of the package that they use. Modules are found in the syntax
trees, nothing is imported: `kl.create_model` is looked up where it is defined, `kl.plots.curves` is the module `plots`,
and what those modules import, inside functions too, belongs to it.
"""

import ast
import functools
import hashlib
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "karat_lite"


def parsed(source: str) -> ast.Module:
    """The syntax tree of a cell, its magics and shell lines left out."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))


def modules() -> dict[str, Path]:
    """Dotted name to file, for every module of the package ("" is the package itself)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def defined(tree: ast.Module) -> set[str]:
    """The names that a module defines at its top level."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


def taken(tree: ast.Module, folder: str = "", alias: str = "") -> set[str]:
    """Dotted names of the package that some code takes, by import or as attributes of the package's `alias`.

    `folder` is the (sub)package that the code lies in, where its relative imports begin.
    """
    name, names, aliases = PACKAGE.name, set(), {alias}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {item.name.removeprefix(name + ".") for item in node.names if item.name.startswith(name + ".")}
            aliases |= {item.asname or name for item in node.names if item.name == name}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = folder.split(".")[: len(folder.split(".")) - node.level + 1]
                base = [*parts, *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == name:
                base = node.module.split(".")[1:]
            else:
                continue
            names |= {".".join(filter(None, [*base, item.name])) for item in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            names.add(node.attr)
    return names


def registers_with(tree: ast.Module) -> set[str]:
    """The decorators register_... of its classes: whoever uses the register may get one of them by its name."""
    calls = [call.func for node in tree.body if isinstance(node, ast.ClassDef) for call in node.decorator_list
             if isinstance(call, ast.Call)]  # fmt: skip
    return {call.id for call in calls if isinstance(call, ast.Name) and call.id.startswith("register_")}


@functools.cache
def outline(text: str) -> tuple[ast.Module, set[str], set[str]]:
    """Of a module's text: the tree, the names it defines, the registers that its classes stand in."""
    tree = ast.parse(text)
    return tree, defined(tree), registers_with(tree)


def modules_used(source: str) -> list[str]:
    """The package's modules that notebook code uses, and those that these use in turn."""
    files = modules()
    read = {name: outline(path.read_text(encoding="utf8")) for name, path in files.items() if name}
    trees, own, registers = ({name: parts[i] for name, parts in read.items()} for i in range(3))
    homes = {}
    for module, names in own.items():
        for name in names:
            homes.setdefault(name, set()).add(module)
    todo, used = taken(parsed(source), alias="kl"), set()
    while todo:
        name = todo.pop()
        owners = {owner for owner in (name, name.rpartition(".")[0]) if owner in trees} or homes.get(name, set())
        for module in owners - used:
            used.add(module)
            todo |= {other for other, names in registers.items() if own[module] & names}
            is_package = files[module].name == "__init__.py"
            todo |= taken(trees[module], module if is_package else module.rpartition(".")[0])
    return sorted(used)


def fingerprint(nb) -> str:
    """Of one notebook. The bootstrap cell is left out: another address of the repository changes no output."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    sources = [cell.source for cell in code if "bootstrap" not in cell.metadata.get("tags", [])]
    digest, files = hashlib.sha256("\0".join(sources).encode()), modules()
    for name in modules_used("\n".join(sources)):
        digest.update(f"\0{name}\0".encode() + files[name].read_bytes())
    return digest.hexdigest()
