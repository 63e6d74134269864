"""`fallow train RECIPE [--setting value …]`: one run, dense or sparse; resumes by itself; torchrun when nproc > 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fallow.errors import ConfigError

_HELP = """usage: fallow train RECIPE [--arm NAME] [--overwrite] [--json] [--SETTING VALUE ...]

Train as the YAML file RECIPE says; a flag overrides its setting. Running the same command again resumes an
unfinished run and leaves a finished one alone.

  --arm NAME   which arm of a recipe with arms
  --overwrite  start anew although the folder holds a run
  --json       print one JSON object (run.json) on stdout, everything else on stderr

settings (default), then the settings of the chosen method:
"""


def train_command(argv: list[str]) -> int:
    """Run one recipe. Returns 0 when it finished, 1 when Ctrl-C interrupted it; raises FallowError otherwise."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_HELP + settings_help())
        return 0 if argv else 2
    path, options, flags = split(argv, switches=("json", "overwrite"))
    from fallow.training.settings import closest, load_file, parse_flags, resolve

    file, settings = load_file(path), parse_flags(flags)
    arm = settings.pop("arm", None)
    names = list(file.get("arms") or {})
    if names and arm not in names:
        asked = "this recipe has arms" if arm is None else f"no arm {arm!r}"
        raise ConfigError(f"{path}: {asked}; use --arm {' or --arm '.join(names)}, or fallow compare")
    if arm is not None and not names:
        raise ConfigError(f"{path}: --arm {arm}: this recipe has no arms{closest('arms', ['arms'])}")
    recipe = resolve(file, settings, arm=arm)
    if recipe.equal_seconds_to is not None:
        raise ConfigError(f"arm {arm}: equal_seconds_to needs the other arm's time; use fallow compare, or set steps")
    if recipe.nproc > 1 and "LOCAL_RANK" not in os.environ:
        return _torchrun(recipe.nproc, argv)
    from fallow.training.progress import Display
    from fallow.training.quiet import quiet
    from fallow.training.run import run

    quiet()
    leader = os.environ.get("RANK", "0") == "0"
    display = Display(to_stderr="json" in options, silent=not leader)
    record = run(
        recipe,
        arm=arm,
        command=" ".join(["fallow train", *argv]),
        display=display,
        overwrite="overwrite" in options,
    )
    if "json" in options and leader:
        print(json.dumps(record))
    return 0 if record["status"] == "finished" else 1


def split(argv: list[str], *, switches: tuple[str, ...]) -> tuple[Path, set[str], list[str]]:
    """(recipe path, switches given, remaining flags). Raises ConfigError when the recipe does not come first."""
    if argv[0].startswith("-"):
        raise ConfigError(f"the recipe comes first, before {argv[0]}; see --help")
    on = {f"--{name}" for name in switches}
    return Path(argv[0]), {a[2:] for a in argv[1:] if a in on}, [a for a in argv[1:] if a not in on]


def settings_help() -> str:
    """One paragraph per setting, from the recipe's own documentation."""
    from fallow.training.recipe import documented_fields

    return "\n".join(f"  {name} ({default})\n      {doc}" for name, default, doc in documented_fields())


def _torchrun(nproc: int, argv: list[str]) -> int:
    # "--" keeps torchrun from reading our flags as abbreviations of its own
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m", "--", "fallow", "train"]
    return subprocess.call([sys.executable, *launch, *argv])
