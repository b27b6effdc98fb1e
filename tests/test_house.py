"""The house: imports run one way, names are unique, files and parameter lists stay short. Reads the code, runs none."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
         for path in sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))])
         if path.name != "__init__.py"}
MAY_IMPORT = {                          # what a room, or a file, may import of ours; others: what runs in no circle
    "support": ("support",),
    "dit": ("support",),
    "domain_shifter": ("support", "dit"),
    "geometry": ("support", "geometry"),
    "toy.world": ("support", "geometry"),
    "toy.trace": ("support", "geometry"),
    "toy.render": ("support", "geometry", "toy.world", "toy.trace"),
}


def imports_of(tree):
    """{name of a file of ours} that a syntax tree imports; `from room import file` counts as that file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(FILES)


def arrows(sources):
    """({file: files it imports}, {file: experiments it hands over to inside main()}) of {file: source}."""
    graph, handed = {}, {}
    for name, source in sources.items():
        graph[name], handed[name] = set(), set()
        for node in ast.parse(source).body:
            imports = imports_of(node)
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                handed[name] |= {other for other in imports if other.startswith("experiments.")}
                imports -= handed[name]
            graph[name] |= imports
    return graph, handed


def complaints(graph):
    """What is wrong with a graph of imports, as sentences."""
    found = []
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    for name, others in graph.items():
        allowed = MAY_IMPORT.get(name, MAY_IMPORT.get(name.split(".")[0]))
        for other in others:
            if allowed is not None and not other.startswith(allowed):
                found.append(f"{name} imports {other}")
            if other.startswith("experiments.") and not name.startswith("experiments."):
                found.append(f"{name} imports {other}")
    return found


def sources():
    return {name: path.read_text() for name, path in FILES.items()}


def test_imports_run_one_way():
    graph, _ = arrows(sources())
    assert len(graph) > 30 and sum(map(len, graph.values())) > 100      # else this reads no house at all
    assert complaints(graph) == []


@pytest.mark.parametrize("file, line", [
    ("support.pictures", "from geometry.camera import VIEWS"),
    ("dit", "import data"),
    ("domain_shifter", "from baselines.adapters import LoRA"),
    ("geometry.mesh", "from toy import world"),
    ("data", "from training.sets import training_sets"),               # a circle
    ("evaluate", "import experiments.tables"),
    ("train_stage2", "from experiments import benchmark"),             # main() may, no other place
])
def test_a_back_arrow_is_seen(file, line):
    planted = sources()
    planted[file] = f"def f():\n    {line}\n" + planted[file]
    assert complaints(arrows(planted)[0])


def test_only_main_hands_over_to_experiments():
    _, handed = arrows(sources())
    assert {name: others for name, others in handed.items() if others and not name.startswith("experiments.")} == {
        "train_stage2": {"experiments.layer_selective", "experiments.benchmark"}}


def test_the_top_level_is_the_card_s():
    scripts = {"dit", "domain_shifter", "train_stage1", "train_stage2", "sample", "evaluate", "pca_features", "data"}
    assert {name for name in FILES if "." not in name} == scripts


def test_a_reader_who_greps_finds_one_definition():
    defined = {}
    for name, source in sources().items():
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "parse_args"):
                defined.setdefault(node.name, []).append(name)
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


def test_files_and_parameter_lists_are_short():
    long = []
    for name, source in sources().items():
        most = 350 if "." in name else 600
        most = 450 if name.startswith("related.") else most             # a paper in a file
        if len(source.splitlines()) > most:
            long.append(f"{name} has {len(source.splitlines())} lines, more than {most}")
        long += [f"{name}, line {k}: over 120 characters" for k, line in enumerate(source.splitlines(), 1)
                 if len(line) > 120]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                inputs = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
                inputs = [name for name in inputs if name != "self"]
                if len(inputs) > 7:
                    long.append(f"{name}, {node.name}: {len(inputs)} parameters")
    assert long == []
