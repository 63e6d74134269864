"""The command line: verbs, exit codes, and one-line errors that name the mend."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import fallow
from fallow import cli
from fallow.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    FallowError,
    GateError,
    UnsupportedModelError,
)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | int], None]:
    """Makes `fallow probe` end with the exception or the exit code given."""

    def install(ending: BaseException | int) -> None:
        def probe_command(argv: list[str]) -> int:
            assert argv == []
            if isinstance(ending, BaseException):
                raise ending
            return ending

        module = ModuleType("fallow.cli.probe")
        module.probe_command = probe_command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fallow.cli.probe", module)
        monkeypatch.setitem(cli.VERBS, "probe", "a verb of this test")

    return install


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("fallow: "), err
    return err.strip()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("omit=1.5 must be below 1"), 2),
        (UnsupportedModelError("no FFN found"), 2),
        (DataError("a.txt is empty"), 2),
        (BackendError("triton needs a GPU"), 2),
        (CheckpointError("step-10 is truncated"), 1),
        (GateError("subset_ffn differs"), 1),
        (FallowError("anything else"), 1),
    ],
)
def test_fallow_errors_are_one_line_and_a_code(verb, capsys, error: FallowError, code: int) -> None:
    verb(error)
    assert cli.main(["probe"]) == code
    assert one_line(capsys) == f"fallow: error: {error}"


def test_a_message_of_several_lines_becomes_one(verb, capsys) -> None:
    verb(ConfigError("first\n   second"))
    assert cli.main(["probe"]) == 2
    assert one_line(capsys) == "fallow: error: first second"


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a.json"), "runs/a.json: no space left on the device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "free some space or choose another output folder"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "choose another output folder"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "choose a folder you may write to"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.yaml"), "a.yaml: no such file or folder; check the path"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "free some space"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "lower the batch size"),
        (MemoryError(), "lower the batch size"),
        (ModuleNotFoundError("No module named 'trl.x'", name="trl.x"), "pip install 'fallow[sft]'"),
        (KeyError("w"), "unexpected KeyError: 'w'; --debug shows the traceback"),
        (OSError("the link is down"), "the link is down"),
    ],
)
def test_other_failures_name_the_mend_and_exit_1(verb, capsys, error: Exception, mend: str) -> None:
    verb(error)
    assert cli.main(["probe"]) == 1
    assert mend in one_line(capsys)


def test_ctrl_c_is_one_line_and_exit_1(verb, capsys) -> None:
    verb(KeyboardInterrupt())
    assert cli.main(["probe"]) == 1
    assert "stopped by Ctrl-C" in one_line(capsys)


@pytest.mark.parametrize(("stop", "code"), [(SystemExit(), 0), (SystemExit(2), 2), (SystemExit("it broke"), 1)])
def test_a_library_that_exits_keeps_our_codes(verb, capsys, stop: SystemExit, code: int) -> None:
    verb(stop)
    assert cli.main(["probe"]) == code
    assert capsys.readouterr().err == ("fallow: error: it broke\n" if code == 1 else "")


@pytest.mark.parametrize("argv", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback_on_either_side(verb, capsys, argv: list[str]) -> None:
    verb(ConfigError("bad"))
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "probe_command" in err
    assert err.endswith("fallow: error: bad\n")


def test_a_verb_returns_its_code(verb, capsys) -> None:
    verb(0)
    assert cli.main(["probe"]) == 0
    assert capsys.readouterr() == ("", "")


def test_unknown_verb_suggests_the_closest(capsys) -> None:
    assert cli.main(["comprae", "x"]) == 2
    assert one_line(capsys) == "fallow: error: no verb 'comprae'; did you mean `fallow compare`?"
    assert cli.main(["zzz"]) == 2
    assert one_line(capsys).endswith(f"verbs: {', '.join(cli.VERBS)}")


def test_help_names_every_verb_and_no_verb_is_bad_use(capsys) -> None:
    assert cli.main(["--help"]) == 0
    shown, _ = capsys.readouterr()
    assert all(f"  {name}" in shown and line in shown for name, line in cli.VERBS.items())
    assert cli.main([]) == 2
    assert capsys.readouterr() == ("", shown)


@pytest.mark.parametrize("name", ["train", "compare", "report", "bench", "doctor"])
def test_every_verb_has_help(capsys, name: str) -> None:
    assert cli.main([name, "--help"]) == 0
    shown, err = capsys.readouterr()
    assert f"fallow {name}" in shown and err == ""


@pytest.mark.parametrize("name", ["train", "compare"])
def test_help_is_help_after_a_recipe_too(capsys, name: str) -> None:
    assert cli.main([name, "recipe.yaml", "--help"]) == 0
    assert f"fallow {name}" in capsys.readouterr().out


def test_bad_flag_is_one_line_and_exit_2(capsys) -> None:
    assert cli.main(["doctor", "--jsno"]) == 2
    assert "unrecognized arguments: --jsno; see `fallow doctor --help`" in one_line(capsys)


def test_module_runs_and_version_is_fast_to_load() -> None:
    code = (
        "import runpy, sys; sys.argv = ['fallow', '--version']\n"
        "try: runpy.run_module('fallow', run_name='__main__')\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"fallow {fallow.__version__}", "0 False"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("| true", ""),
        (
            "> /dev/full",
            "fallow: error: no space left on the device; free some space or choose another output folder\n",
        ),
    ],
)
def test_output_that_cannot_be_written(target: str, said: str) -> None:
    # pipefail, so that the exit code is fallow's; "--help" alone would fit the pipe before `true` has gone.
    script = f"set -o pipefail; (sleep 0.2; {sys.executable} -m fallow --help) {target}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
