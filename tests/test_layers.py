"""The architecture, read from the source: imports point down, names shadow nothing, and no path is one machine's."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import hfkit

ROOT = Path(__file__).parent.parent

# A module may import from its own layer and from those above it in this table; within a layer there are no cycles.
LAYERS = [
    {"settings", "config", "yaml12", "text", "quality", "files", "status", "masking"},
    {
        *("data.account", "data.catalog", "data.documents", "data.holdout", "data.hooks", "data.listing", "data.pairs"),
        *("data.refine", "data.drafts", "data.equal", "data.rows", "data.spread", "data.executors"),
        *("data.texts", "data.winnow", "data.words", "data.workers"),
        *("data.readers", "data.sources", "data.corpus", "data.dedup", "data.contamination", "data.once"),
        *("data.prepare", "data.shards", "data.tokens", "data.order", "data.batches", "data.builtin"),
        *("data.builtin_sentiment", "data.builtin_translation"),
        *("data.builtin_chat", "data.conversations", "data.preferences"),
        *("data.labels", "data.label_batches", "data.pair_batches"),
        *(
            "chat",
            "tokenizer",
            "encoder",
            "optim",
            "muon",
            "tracking",
            "charts",
            "page",
            "report",
            "audit_page",
            "scaling",
            "sweep_report",
            "passport",
            "progress",
            "markdown",
            "usage",
            "remote",
        ),
    },
    {"attention", "adapters", "compilation", "model", "losses", "preference", "metrics", "products"},
    {"checkpoint", "loop", "generation", "replies", "dialogue", "evaluation", "export", "harness"}
    | {"classification", "prediction", "translation", "translation_scores", "languages", "codec", "decoding", "search"},
    {"launch", "precision", "sharding", "run", "facts", "recorder", "energy", "selection", "adaptation"}
    | {"hub", "card", "sections", "plan", "resume", "publisher", "staging", "dataset_card"},
]
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}
TORCH_FREE = {"settings", "config", "yaml12", "text", "quality", "files", "status", "masking"}


def module_name(path: Path) -> str:
    """Return the name below hfkit, such as ``data.order``; a package's own file has the package's name."""
    parts = path.relative_to(ROOT / "hfkit").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {
    name: path for path in sorted((ROOT / "hfkit").rglob("*.py")) if (name := module_name(path)) not in ("", "data")
}
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it; ``from a import b`` gives ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def hfkit_imports(path: Path) -> set[str]:
    """Return the modules of hfkit that a file imports."""
    return {name.removeprefix("hfkit.") for name in imports_of(path)} & (MODULES.keys() | LAYER_OF.keys())


def test_every_module_has_a_layer() -> None:
    unknown = MODULES.keys() - LAYER_OF.keys()
    assert not unknown, f"decide which layer {sorted(unknown)} belong to and add them to LAYERS in {__file__}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    upward = {other for other in hfkit_imports(MODULES[module]) if LAYER_OF[other] > LAYER_OF.get(module, 0)}
    assert not upward, f"hfkit.{module} imports {sorted(upward)} from a higher layer"


def test_there_are_no_import_cycles() -> None:
    waiting = {module: hfkit_imports(path) - {module} for module, path in MODULES.items()}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"these modules import each other in a circle: {waiting}"


@pytest.mark.parametrize("module", sorted(TORCH_FREE & MODULES.keys()))
def test_what_recipes_read_first_is_light(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy"}
    assert not imports_of(MODULES[module]) & heavy


def test_nothing_in_hfkit_imports_a_recipe() -> None:
    for module, path in MODULES.items():
        names = {name.split(".")[0] for name in imports_of(path)}
        assert not names & ({"recipes", "tests", "benchmarks"} | RECIPES.keys()), module


def test_package_holds_its_version_only() -> None:
    _docstring, *statements = ast.parse((ROOT / "hfkit/__init__.py").read_text("utf-8")).body
    assert [ast.unparse(statement) for statement in statements] == [f"__version__ = '{hfkit.__version__}'"]


def test_no_recipe_shadows_a_module() -> None:
    # Python puts a script's folder first on sys.path, so recipes/evaluate.py would become `import evaluate`.
    taken = packages_distributions().keys() | sys.stdlib_module_names
    assert not RECIPES.keys() & taken


def test_no_file_names_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = tuple(f"/{folder}/" for folder in ("work", "root"))
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        assert not any(word in text for word in private), f"{name} names a path of one machine"
