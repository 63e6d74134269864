"""The house rules that a machine can check: rooms, family names, file sizes, paths, and what the README promises."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fallow
from fallow.cli import VERBS, usage

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fallow"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 330

# What configs call the families (`model_type`), and the prefixes of their classes. Only anatomy may say them in code.
FAMILY = re.compile(
    r"(llama|mistral|mixtral|qwen\d?|gemma\d?|olmo\d?|smollm3|granite|phi3?|gpt_?neox|gpt2|opt)"
    r"(_text|_moe)?(\d*(Config|Model|MLP|Attention|DecoderLayer|ForCausalLM))?",
    re.IGNORECASE,
)
# Benchmarks build stock models of known widths, so they must name a class of transformers; exports write the formats of
# engines that have such names.
MAY_NAME_FAMILIES = {"anatomy", "bench", "exporting"}


def rooms() -> list[str]:
    """Rooms from top to bottom, read from the tree in docs/architecture.md."""
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    return re.findall(r"^  (?!__)(\w+)(?:/|\.py) ", tree, flags=re.MULTILINE)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    """Rooms of fallow that a module imports, at the top, inside functions, for typing only, or by `import_module`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fallow.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "fallow":
            found |= {fallow._HOMES.get(a.name, f"fallow.{a.name}").split(".")[1] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fallow."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fallow":
            found.add(fallow._HOMES.get(node.attr, f"fallow.{node.attr}").split(".")[1])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            named = [c.value for a in node.args for c in ast.walk(a) if isinstance(c, ast.Constant)]
            found |= {m.group(1) for n in named if (m := re.match(r"fallow\.(\w+)", str(n)))}
    return found - {"__version__"}


def code_names(tree: ast.Module) -> set[str]:
    """Identifiers and string constants of a module, without docstrings and other bare strings."""
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            names.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            names |= {part for part in (node.module or "").split(".")} | {a.name for a in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return names


def test_architecture_lists_the_rooms() -> None:
    found = rooms()
    assert found[0] == "cli" and found[-1] == "errors"
    assert {room_of(p) for p in SOURCES} - {"__init__", "__main__"} <= set(found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below(path: Path) -> None:
    room, order = room_of(path), rooms()
    if room in ("__init__", "__main__"):
        return
    above = order[: order.index(room)]
    upward = imported_rooms(ast.parse(path.read_text())) & set(above)
    assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}, which stand above {room!r}"


def test_the_import_rule_sees_every_form_of_import() -> None:
    forms = (
        "import fallow.training\n",
        "from fallow.training.data import x\n",
        "from fallow import training\n",
        "from fallow import SparsityCallback\n",
        "import fallow\nfallow.SparsityCallback\n",
        "def f():\n    from fallow.training import x\n",
        "import_module('fallow.training.data')\n",
    )
    for form in forms:
        assert imported_rooms(ast.parse(form)) == {"training"}, form
    assert imported_rooms(ast.parse("from fallow import __version__\nimport torch\n")) == set()


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if room_of(p) not in MAY_NAME_FAMILIES], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_only_anatomy_knows_model_families(path: Path) -> None:
    named = {name for name in code_names(ast.parse(path.read_text())) if FAMILY.fullmatch(name)}
    assert not named, f"{path.relative_to(ROOT)} names {sorted(named)}: a family belongs into anatomy/families.py"


def test_the_family_rule_catches_names() -> None:
    bad = ast.parse("if config.model_type == 'qwen3': ...\nfrom transformers import LlamaForCausalLM\n")
    assert {n for n in code_names(bad) if FAMILY.fullmatch(n)} == {"qwen3", "LlamaForCausalLM"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_source_files_are_short_and_portable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < MAX_LINES
    assert not re.findall(r"(?<![\w.])/(?:work|root|home)\b|TODO|FIXME", text)
    assert ast.get_docstring(ast.parse(text)), "a file opens with what it does"


def readme_commands() -> list[list[str]]:
    """Every `fallow ...` line in the fenced blocks of the README and the tutorial, split into words."""
    commands = []
    for page in ("README.md", "docs/tutorial.md"):
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
            lines = [line.split("#")[0].split() for line in block.splitlines()]
            commands += [words for words in lines if words[:1] == ["fallow"]]
    return commands


def test_readme_verbs_and_help_agree() -> None:
    shown = {words[1] for words in readme_commands()}
    assert shown >= set(VERBS), "the README shows each verb once"
    assert shown - {"--help", "--version"} <= set(VERBS)
    assert {line.split()[0] for line in usage().split("verbs:\n")[1].split("\n\n")[0].splitlines()} == set(VERBS)
    assert {p.stem for p in (PACKAGE / "cli").glob("*.py")} - {"__init__"} == set(VERBS)


def test_readme_files_exist() -> None:
    for page in ("README.md", "docs/tutorial.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        linked = re.findall(r"\]\(([\w./-]+)\)", text)
        named = re.findall(r"\b(?:recipes|examples)/[\w-]+\.(?:yaml|py)\b", text)
        missing = [f for f in linked if not (ROOT / page).parent.joinpath(f).exists()]
        missing += [f for f in named if not (ROOT / f).exists()]
        assert not missing, f"{page} points at files that are not there: {missing}"


def test_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fallow.__version__
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in map(Requirement, asked):
        pinned = pins.get(requirement.name.lower())
        assert pinned, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pinned), f"{requirement} excludes the pinned {pinned}"
