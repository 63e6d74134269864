"""The `fallow` command: picks the verb, runs it, and turns every failure into one line and an exit code.

Each verb is one file here with `VERB_command(argv) -> int`, imported only when it is asked for, so that `fallow --help`
costs no import of torch. Exit codes: 0 done; 1 it failed; 2 it was asked wrongly (settings, data, model, backend).
The obvious alternative, one argparse tree for all verbs, would import every room of the package to print one line.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import traceback
from importlib import import_module
from typing import NoReturn

from fallow.errors import BackendError, ConfigError, DataError, FallowError, UnsupportedModelError

VERBS = {
    "train": "one training run, dense or sparse; resumes where it stopped",
    "compare": "dense and sparse arms on the same data, then one report",
    "generate": "a text from a model, dense or sparse, and its tokens per second",
    "evaluate": "perplexity, RULER and lm-eval's tasks, dense and sparse side by side",
    "diagnose": "which layer breaks long context, and why",
    "repair": "mends that layer, and keeps the repair only if nothing else suffers",
    "report": "one self-contained HTML page from run folders",
    "export": "the trained model for stock transformers, or packed without its zeros; verified",
    "bench": "step and kernel times against the fastest dense form, with the break-even",
    "doctor": "what this machine can do: backends found, used, refused, and why",
}

_BAD_USE = (ConfigError, UnsupportedModelError, DataError, BackendError)

_EXTRA_OF_MODULE = {"trl": "sft", "lm_eval": "eval", "gguf": "gguf", "triton": "gpu"}

_FULL = "no space left on the device; free some space or choose another output folder"
_READ_ONLY = "the file system is read-only; choose another output folder"
_DENIED = "permission denied; choose a folder you may write to, or change its permissions"
_MEND_OF_ERRNO = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
}
# Libraries written in Rust and C++ (safetensors, torch.save) hand the operating system's error on as text only.
_MEND_OF_TEXT = {
    "no space left on device": _FULL,
    "os error 28": _FULL,
    "read-only file system": _READ_ONLY,
    "os error 30": _READ_ONLY,
    "permission denied": _DENIED,
    "out of memory": "out of memory; lower the batch size or the sequence length",
    "can't allocate memory": "out of memory; lower the batch size or the sequence length",
}


class VerbParser(argparse.ArgumentParser):
    """argparse whose complaints are a ConfigError, hence one line and exit code 2 like every other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def usage() -> str:
    """The text of `fallow --help`: one line per verb."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, line in VERBS.items())
    return (
        "usage: fallow [--help] [--version] [--debug] VERB ...\n\n"
        "Sparse training for language models, measured.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`fallow VERB --help` tells more. --debug, before or after the verb, shows the traceback of an error."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command line (default: `sys.argv[1:]`) and return its exit code: 0 done, 1 failed, 2 bad use."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        code = _dispatch(args)
        _flush()
        return code
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C; checkpoints already written stay valid", debug)
        return 1
    except BrokenPipeError:
        return 1  # the reader (`| head`) has what it wanted
    except Exception as error:
        _say(f"error: {explain(error)}", debug)
        return 2 if isinstance(error, _BAD_USE) else 1


def explain(error: Exception) -> str:
    """`error` as one line: what, where, how to mend."""
    if isinstance(error, FallowError):
        return _one_line(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno in _MEND_OF_ERRNO:
        where = f"{error.filename}: " if error.filename else ""
        return where + _MEND_OF_ERRNO[error.errno]
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder; check the path"
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.split(".")[0]
        if top in _EXTRA_OF_MODULE:
            return f"{top} is not installed; pip install 'fallow[{_EXTRA_OF_MODULE[top]}]'"
    text = _one_line(error)
    for clue, mend in _MEND_OF_TEXT.items():
        if clue in text.lower():
            return f"{mend} ({text[:160]})"
    if isinstance(error, MemoryError):
        return _MEND_OF_TEXT["out of memory"]
    if isinstance(error, OSError):
        return text
    return f"unexpected {type(error).__name__}: {text}; --debug shows the traceback"


def _dispatch(args: list[str]) -> int:
    if not args:
        print(usage(), file=sys.stderr)
        return 2
    verb, rest = args[0], args[1:]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        from fallow import __version__

        print(f"fallow {__version__}")
        return 0
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean `fallow {close[0]}`?" if close else f"verbs: {', '.join(VERBS)}"
        raise ConfigError(f"no verb {verb!r}; {hint}")
    return getattr(import_module(f"fallow.cli.{verb}"), f"{verb}_command")(rest)


def _flush() -> None:
    """Write what is buffered now, while a failure can still be told, and not at exit, where Python would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _exit_code(stop: SystemExit) -> int:
    """A library's `sys.exit(...)` as our code: None is 0, a number is itself, a message is printed and is 1."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    _say(f"error: {_one_line(stop)}", debug=False)
    return 1


def _say(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"fallow: {line}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
