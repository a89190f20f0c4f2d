"""Nothing in the tree runs what it reads: no pickle, no eval, no remote code."""

import ast

import pytest

from tests.test_architecture import ROOT

# Modules whose files can hold code to run, and calls that run what they are given.
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}
FLAGS = {"trust_remote_code", "allow_pickle", "shell"}
# Reads `.bin` files where asked to, by torch's loader of nothing but tensors; `pickle`
# gives it the name of an error.
EXEMPT = {
    ("timeviper_jax/conversion/files.py", "import pickle"),
    ("timeviper_jax/conversion/files.py", "torch.load(weights_only=True)"),
}
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).parts[0] not in ("tests", "runs", "data", "build")
]


def findings(source: str) -> list[str]:
    """What a file does that may run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            found += [f"import {name}" for name in names & MODULES]
        elif isinstance(node, ast.ImportFrom):
            name = (node.module or "").split(".")[0]
            found += [f"import {name}"] if name in MODULES else []
        elif isinstance(node, ast.Call):
            found += _of_call(node)
    return found


def _of_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name == "torch.load":
        return [f"torch.load(weights_only={given.get('weights_only')})"]
    flags = [f"{flag}=True" for flag in FLAGS if given.get(flag) == "True"]
    return [name, *flags] if name in CALLS else flags


def test_the_tree_runs_nothing_that_it_reads():
    assert len(FILES) > 100
    found = {
        (str(path.relative_to(ROOT)), finding)
        for path in FILES
        for finding in findings(path.read_text())
    }
    assert found == EXEMPT


@pytest.mark.parametrize(
    "source, finding",
    [
        ("from pickle import loads", "import pickle"),
        ("import numpy, dill.source", "import dill"),
        ("value = eval(text)", "eval"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("torch.load(path)", "torch.load(weights_only=None)"),
        ("subprocess.run(line, shell=True)", "shell"),
    ],
)
def test_the_scan_notices(source, finding):
    (found,) = findings(source)
    assert found.startswith(finding)


def test_the_scan_leaves_methods_of_the_same_name_alone():
    assert not findings("jax.jit(f).lower(x).compile(); model.eval(); re.compile('x')")
