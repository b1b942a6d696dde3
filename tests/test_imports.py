"""Importing costs nothing, every public name resolves, and modules depend downwards only."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import nnsight_transcoders

ROOT = Path(nnsight_transcoders.__file__).parent
PACKAGE = "nnsight_transcoders"
FILES = sorted(ROOT.rglob("*.py"))
MODULES = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES]
#: Doors from the graph to the model: methods that are handed a model import what runs it when they
#: are called. (module, what it imports there); ``reach`` does not go through them.
DOORS = {("circuits.graph_exports", ".circuits.interventions")}
HEAVY = {"torch", "transformers", "nnsight", "numpy", "safetensors", "huggingface_hub"}


def fresh(code: str) -> set[str]:
    """The top-level modules loaded after running some code in a new interpreter."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


# -- the lazy front ------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    assert not fresh(f"import {PACKAGE}; {PACKAGE}.__version__; dir({PACKAGE})") & HEAVY
    assert not fresh(f"from {PACKAGE} import TranscoderError") & HEAVY


def test_a_name_loads_what_it_needs_and_no_more():
    assert "torch" in fresh(f"from {PACKAGE} import TranscoderSet")
    assert not fresh(f"from {PACKAGE} import TranscoderSet") & {"nnsight", "transformers"}
    assert not fresh(f"from {PACKAGE} import AttributionGraph") & {"nnsight", "transformers"}


@pytest.mark.parametrize("name", nnsight_transcoders.__all__)
def test_every_public_name_resolves(name):
    value = getattr(nnsight_transcoders, name)
    assert name in dir(nnsight_transcoders)
    assert getattr(value, "__name__", name).split(".")[-1] == name or not callable(value)


def test_the_names_for_type_checkers_are_the_lazy_ones():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        alias.name: "." * node.level + (node.module or "")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == nnsight_transcoders._PUBLIC


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'attach_all'"):
        nnsight_transcoders.attach_all  # noqa: B018


# -- the direction of dependence -----------------------------------------------------------------


def _source(module: str) -> Path:
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"


@cache
def imports(module: str, *, top: bool = False) -> frozenset[str]:
    """What a module imports anywhere in its file: other packages by their top-level name, this
    package's modules as ``.name`` without the package. Type-checking imports count as well.
    With ``top``: only what is imported when the module is."""
    path = _source(module)
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE, *package][: 1 + len(package) - (node.level - 1)] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{origin}.{a.name}" for a in node.names] if _is_package(origin) else [origin]
        else:
            continue
        found |= {_short(name) for name in names}
    return frozenset(found)


def _is_package(name: str) -> bool:
    inside = name.removeprefix(PACKAGE).strip(".").replace(".", "/")
    return name.split(".")[0] == PACKAGE and (ROOT / inside).is_dir()


def _short(name: str) -> str:
    if name.split(".")[0] != PACKAGE:
        return name.split(".")[0]
    inside = name.removeprefix(PACKAGE)
    if not _source(inside[1:]).exists():  # a name of a package's __init__, not a module
        inside = inside.rpartition(".")[0]
    return inside or ".__init__"


@cache
def reach(module: str) -> frozenset[str]:
    """Everything a module imports, itself or through this package's other modules."""
    seen: set[str] = set()
    todo = [f".{module}"]
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        if here.startswith("."):
            todo += [n for n in imports(here[1:]) if (here[1:], n) not in DOORS]
    return frozenset(seen - {f".{module}"})


def stdlib_only(names: frozenset[str]) -> set[str]:
    """The names that are neither this package's nor the standard library's."""
    return {n for n in names if not n.startswith(".") and n not in sys.stdlib_module_names}


def test_the_reader_of_imports_sees_them():
    assert {".errors", ".sets", ".attachment.replacement", "torch"} <= imports("attachment.edit")
    assert {".attachment.replacement", "nnsight", "torch"} <= imports("attachment.splices")
    assert {".sets", ".hub.registry"} <= imports("hub.native") | imports("sets")
    assert ".circuits.collect" in imports("circuits.attribution")
    assert "transformers" not in imports("attachment.edit")
    assert {"torch", ".activations"} <= reach("attachment.edit")


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("activations", {".errors"}),
        ("sparse_product", set()),
        ("transcoder", {".errors", ".activations", ".sparse_product"}),
        ("layer_sources", {".transcoder"}),
        ("norms", {".errors"}),
        ("blocks", {".errors"}),
        ("sites", {".errors", ".blocks"}),
        ("models", {".builtin", ".errors"}),
        ("attachment.replacement", {".errors", ".sets", ".transcoder"}),
        ("circuits.folded", {".circuits.linear"}),  # for type checkers
        ("circuits.linear", {".circuits.folded"}),
        ("circuits.edges", {".circuits.linear"}),
    ],
)
def test_the_lowest_modules_import_torch_and_what_is_below_them(module, allowed):
    assert {n for n in imports(module) if n.startswith(".")} <= allowed
    assert stdlib_only(imports(module)) <= {"torch"}


def test_sets_reach_the_hub_only_when_called():
    """``from_pretrained`` and the like import the hub inside the method; nothing else does."""
    tree = ast.parse(_source("sets").read_text())
    top = [ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not any("hub" in line for line in top)
    own = {n for n in imports("sets") if n.startswith(".") and not n.startswith(".hub")}
    assert own <= {".errors", ".activations", ".layer_sources", ".transcoder"}
    assert stdlib_only(imports("sets")) <= {"torch"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("hub.")])
def test_the_hub_knows_sets_but_no_model(module):
    own = {n for n in imports(module) if n.startswith(".") and not n.startswith(".hub")}
    assert own <= {
        ".__init__",
        "._files",
        "._version",
        ".builtin",
        ".errors",
        ".layer_sources",
        ".sets",
        ".transcoder",
    }
    assert not {"nnsight", "transformers"} & imports(module)


def test_attach_knows_sites_and_sites_do_not_know_attach():
    assert ".sites" in imports("attachment.edit")
    assert not {".sets", ".transcoder"} & reach("sites")
    assert not any(name.startswith(".attachment") for name in reach("sites"))
    own = {n for n in imports("attachment.edit") if n.startswith(".")}
    below = {".blocks", ".errors", ".models", ".sets", ".sites"}
    parts = ("feature_edits", "feature_rows", "mounted", "replacement")
    assert own <= below | {f".attachment.{part}" for part in parts}


@pytest.mark.parametrize(
    "module",
    ["attachment.remote_layers", "evaluation.fit_job", "site_reads", "circuits.invariant_job"],
)
def test_what_runs_in_a_remote_job_can_be_shipped(module):
    """Torch and nnsight are all that a server has; the package's own modules travel as text."""
    from nnsight_transcoders.remote.shipping import shipped_sources

    loaded = importlib.import_module(f"{PACKAGE}.{module}")
    ours = loaded.__name__
    functions = [f for f in vars(loaded).values() if getattr(f, "__module__", "") == ours]
    shipped = set(shipped_sources(functions[0]))
    assert loaded.__name__ in shipped
    assert not {f"{PACKAGE}.sets", f"{PACKAGE}.sites", f"{PACKAGE}.attachment.mounted"} & shipped


def test_the_doors_open_in_calls_only():
    for module, behind in DOORS:
        assert behind in imports(module)
        assert behind not in imports(module, top=True) or behind in _type_checking(module)


def _type_checking(module: str) -> set[str]:
    """What a module imports for type checkers."""
    tree = ast.parse(_source(module).read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    lines = [ast.unparse(n) for block in blocks for n in block.body]
    package = "." + module.rpartition(".")[0]
    return {package + line.split()[1] for line in lines if line.startswith("from .")}


@pytest.mark.parametrize("module", ["circuits.graph", "circuits.prune"])
def test_the_graph_knows_torch_and_no_model(module):
    assert not {"nnsight", "transformers"} & reach(module)


@pytest.mark.parametrize("module", ["circuits.linear", "circuits.edges"])
def test_the_operator_could_be_shipped_on_its_own(module):
    assert stdlib_only(reach(module)) <= {"torch"}
    assert {n for n in reach(module) if n.startswith(".")} <= {
        ".circuits.folded",
        ".circuits.linear",
        ".circuits.edges",
    }


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(("viewer.", "interop."))])
def test_the_viewer_and_interop_know_graphs_only(module):
    assert "nnsight" not in reach(module)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_the_command_line(module):
    if module not in ("__main__", "cli") and not module.startswith("cli."):
        assert not any(n == ".cli" or n.startswith(".cli.") for n in imports(module))


def test_nothing_depends_on_itself_at_import_time():
    """Imports at the top of a file have no cycle; those inside functions may point back up."""
    graph = {module: _top_level(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph.get(module, set()):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def _top_level(module: str) -> set[str]:
    """This package's modules that are imported when a module is."""
    names = imports(module, top=True)
    return {name[1:] for name in names if name.startswith(".")} - {module}


# -- habits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_no_module_prints(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_no_module_changes_torch_transformers_or_nnsight(path):
    """We never patch what we build on: no assignment to an attribute of their modules."""
    tree = ast.parse(path.read_text())
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    roots = {
        t.value.id
        for t in targets
        if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name)
    }
    assert not roots & {"torch", "transformers", "nnsight", "F"}


def test_no_public_name_is_a_modules():
    """Importing a submodule sets it as the package's attribute: a name of both would be either."""
    assert not set(nnsight_transcoders._PUBLIC) & set(MODULES)
