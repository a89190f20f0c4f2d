"""The house: who may import whom, and what every file begins with."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# A file imports from lower levels, and at its own level only from its own package.
LEVELS = {
    "pallas_kernels": 0,
    "timeviper_jax.checksums": 1,
    "timeviper_jax.flops": 1,
    "timeviper_jax.sharding": 1,
    "timeviper_jax.layers": 1,
    "timeviper_jax.data": 1,
    "timeviper_jax.vision": 2,
    "timeviper_jax.llm": 2,
    "timeviper_jax.timeviper": 3,
    "timeviper_jax.presets": 3,
    "timeviper_jax.training": 4,
    "timeviper_jax.inference": 4,
    "timeviper_jax.conversion": 4,
    "timeviper_jax.evals": 5,
    "timeviper_jax.analysis": 6,
    "timeviper_jax.benchmarks": 6,
    "configs": 7,
    "train": 8,
    "eval": 8,
}
# The model's own two files are one package in all but name.
SAME_PACKAGE = {"timeviper_jax.presets": "timeviper_jax.timeviper"}
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
CONFIG_IMPORTS = ("ml_collections", "collections", "typing", "dataclasses", "configs")

FOLDERS = ("pallas_kernels", "timeviper_jax", "configs")


def _name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ROOMS = {
    _name(path): path.read_text()
    for path in [
        *ROOT.glob("*.py"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    ]
}


def _imports(source: str) -> list[str]:
    """Full names of what a file imports; `from a import b` gives `a.b`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"Relative import of {node.module}: say it in full."
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _room(name: str) -> str | None:
    """The longest entry of LEVELS that holds the module `name`."""
    rooms = [room for room in LEVELS if name == room or name.startswith(room + ".")]
    return max(rooms, key=len, default=None)


def _trespasses(name: str, source: str) -> list[str]:
    """What the module `name` imports from its own level or above."""
    here, found = _room(name), []
    for imported in _imports(source):
        there = _room(imported)
        if there is None or there == here or SAME_PACKAGE.get(here) == there:
            continue
        if here is None or LEVELS[there] >= LEVELS[here]:
            found.append(f"{name} imports {imported}")
    return found


def test_every_file_says_what_it_is_for():
    tests = {str(p): p.read_text() for p in (ROOT / "tests").rglob("*.py")}
    files = {**ROOMS, **tests}
    assert not [
        name for name, text in files.items() if not ast.get_docstring(ast.parse(text))
    ]


def test_every_file_has_a_level():
    assert [name for name in ROOMS if _room(name) is None] == ["timeviper_jax"]


def test_files_import_only_from_lower_levels():
    assert not [
        found for name, text in ROOMS.items() for found in _trespasses(name, text)
    ]


def test_the_rule_notices_a_trespasser():
    source = "from timeviper_jax.llm import hybrid\nimport timeviper_jax.data.needles\n"
    assert _trespasses("timeviper_jax.layers.imagined", source) == [
        "timeviper_jax.layers.imagined imports timeviper_jax.llm.hybrid",
        "timeviper_jax.layers.imagined imports timeviper_jax.data.needles",
    ]
    assert not _trespasses("timeviper_jax.llm.imagined", "import pallas_kernels.ssd")


def _roots(prefixes: tuple[str, ...]) -> set[str]:
    """Top-level names imported under any of `prefixes`."""
    return {
        imported.split(".")[0]
        for name, text in ROOMS.items()
        if name.startswith(prefixes)
        for imported in _imports(text)
    }


def test_the_input_pipeline_runs_without_jax():
    assert not _roots(("timeviper_jax.data",)) & set(JAX)


def test_configs_are_data():
    assert _roots(("configs",)) <= set(CONFIG_IMPORTS)
