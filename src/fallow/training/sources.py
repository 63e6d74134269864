"""Where training text comes from: files, globs, folders, hub names, and the documentation inside the running Python.

Everything becomes a list of documents: `{"text"}` for plain text, `{"prompt", "answer"}` for instruction data. Files
are read as bytes first and checked as UTF-8 here, because the `datasets` loaders report bad bytes without naming file
or offset; `datasets` then parses the structured ones (.jsonl, .parquet, hub names). Text that should be one document
each stays whole; the packer cuts it.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Literal

from fallow.errors import DataError
from fallow.training.cache import cache_folder, write_atomically

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".py")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
PYTHON_REFERENCE = "python-reference"
_NOT_DOCUMENTED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}

Document = dict[str, str]


@dataclass(kw_only=True, slots=True)
class Fields:
    """Which fields of a row to take."""

    task: Literal["clm", "sft"] = "clm"
    """`clm` takes `text`; `sft` takes `prompt` and `answer`."""
    text: str = "text"
    """Field of the text."""
    prompt: str = "prompt"
    """Field of the prompt."""
    answer: str = "answer"
    """Field of the answer."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are no UTF-8."""

    def wanted(self) -> dict[str, str]:
        """Our key → the row's field."""
        return {"text": self.text} if self.task == "clm" else {"prompt": self.prompt, "answer": self.answer}


@dataclass(kw_only=True, slots=True)
class Source:
    """One file or hub dataset, with the digest of its content."""

    name: str
    """Path or hub name."""
    digest: str
    """sha256 of the file; of name and fingerprint for a hub dataset."""
    on_hub: bool = False
    """Loaded through the hub rather than from a file."""


def find(entries: Iterable[str]) -> list[Source]:
    """Expand entries of a recipe into sources, in a stable order.

    Raises:
        DataError: an entry matches nothing, or a file of an unknown kind.
    """
    sources: list[Source] = []
    for entry in entries:
        if entry == PYTHON_REFERENCE:
            sources.append(_file_source(python_reference()))
            continue
        paths = _paths(entry)
        if paths:
            sources.extend(_file_source(path) for path in paths)
        elif any(c in entry for c in "*?[") or entry.startswith((".", "/", "~")) or Path(entry).suffix:
            raise DataError(f"data {entry!r}: no such file; check the path (relative to {Path.cwd()})")
        else:
            sources.append(Source(name=entry, digest=hashlib.sha256(entry.encode()).hexdigest(), on_hub=True))
    return sources


def read(sources: Iterable[Source], fields: Fields) -> Iterator[Document]:
    """Every document of every source, in order; empty ones are left out.

    Raises:
        DataError: bytes that are no UTF-8, a row without the wanted field, or data that cannot be parsed.
    """
    for source in sources:
        if source.on_hub or Path(source.name).suffix.lower() in ROW_SUFFIXES:
            yield from _rows(source, fields)
            continue
        if fields.task == "sft":
            raise DataError(
                f"{source.name}: task sft needs prompt and answer rows (.jsonl or .parquet), not plain text"
            )
        text = _decode(Path(source.name), fields)
        text = _html_text(text) if Path(source.name).suffix.lower() in (".html", ".htm") else text
        if text.strip():
            yield {"text": text}


def python_reference() -> Path:
    """The language topics and standard-library docstrings of the running Python, written once to the cache as .jsonl.

    Modules are parsed, never imported: importing all of the standard library opens browsers and prints poems.

    Raises:
        DataError: this Python ships neither topics nor sources.
    """
    target = cache_folder("data") / f"python-reference-{sys.version.split()[0]}.jsonl"
    if target.exists():
        return target
    documents: list[str] = []
    try:
        topics = import_module("pydoc_data.topics").topics
        documents += [topics[name] for name in sorted(topics)]
    except ModuleNotFoundError:
        pass
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _NOT_DOCUMENTED & set(path.relative_to(root).parts[:-1]):
            documents += _docstrings(path, ".".join(path.relative_to(root).with_suffix("").parts))
    if not documents:
        raise DataError(f"python-reference: {root} holds no topics and no sources; name your own text as train_data")
    write_atomically(target, "".join(json.dumps({"text": text}) + "\n" for text in documents).encode())
    return target


def _docstrings(path: Path, module: str) -> list[str]:
    """One document with every docstring of a module under its dotted name; none when there is little to read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    parts: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                signature = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""  # type: ignore[attr-defined]
                parts.append(f"{name}{signature}\n\n{doc}")
            for child in node.body:
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    visit(child, f"{name}.{child.name}")

    visit(tree, module.removesuffix(".__init__"))
    text = "\n\n".join(parts)
    return [text] if len(text) > 400 else []


def _paths(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES + ROW_SUFFIXES and p.is_file())
        if not found:
            kinds = " ".join(TEXT_SUFFIXES + ROW_SUFFIXES)
            raise DataError(f"data folder {entry!r} holds no readable file; looked for {kinds}")
        return found
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES + ROW_SUFFIXES:
            raise DataError(f"{entry}: unknown kind of file; use {' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}")
        return [path]
    return sorted(Path(p) for p in glob.glob(os.path.expanduser(entry), recursive=True) if Path(p).is_file())


def _file_source(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            return Source(name=str(path), digest=hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _decode(path: Path, fields: Fields) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8", errors=fields.encoding_errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8; convert the file,"
            " or set encoding_errors: replace"
        ) from None


def _rows(source: Source, fields: Fields) -> Iterator[Document]:
    wanted = fields.wanted()
    for number, row in enumerate(_raw_rows(source, fields), start=1):
        document: Document = {}
        for key, name in wanted.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                have = ", ".join(row) if isinstance(row, dict) else "no fields"
                problem = "is no text" if isinstance(row, dict) and name in row else "is missing"
                raise DataError(
                    f"{source.name}: row {number}: field {name!r} {problem} (the row has: {have}); set {key}_field"
                )
            document[key] = row[name]
        if all(text.strip() for text in document.values()):
            yield document


def _raw_rows(source: Source, fields: Fields) -> Iterator[object]:
    import datasets

    if source.on_hub:
        try:
            yield from datasets.load_dataset(source.name, split="train")
        except Exception as error:  # the hub client raises a dozen kinds, all of which mean the same to the user
            raise DataError(
                f"data {source.name!r} is no file here, and the hub gave none ({type(error).__name__}); check the name"
            ) from None
    elif source.name.lower().endswith(".parquet"):
        try:
            yield from datasets.Dataset.from_parquet(source.name, keep_in_memory=True)  # type: ignore[misc]
        except Exception as error:
            raise DataError(
                f"{source.name}: no readable parquet file ({type(error).__name__}); write it anew"
            ) from None
    else:
        text = _decode(Path(source.name), fields)
        if text.lstrip().startswith("["):
            yield from _parse(source.name, 1, text)  # type: ignore[misc]
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parse(source.name, number, line)


def _parse(name: str, number: int, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{name}: line {number} is no valid JSON ({error}); mend or remove the line") from None


class _Text(HTMLParser):
    """Collects the visible text of a page; block elements end a line."""

    _SKIPPED = ("script", "style", "head", "nav", "template", "noscript")
    _BLOCKS = ("p", "div", "li", "tr", "br", "pre", "table", "ul", "ol", "dl", "dt", "dd", "section", "article")
    _BLOCKS += ("h1", "h2", "h3", "h4", "h5", "h6", "blockquote")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in self._SKIPPED
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in self._SKIPPED))
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def _html_text(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = (line.rstrip() for line in "".join(parser.parts).splitlines())
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip()
