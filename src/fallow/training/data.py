"""Training and held-out token rows for a recipe: read, split, tokenise, pack, and cache by content.

Every arm of a comparison and every resumed run reads the same packed rows, so they are made once and kept as two
Arrow files under a key of (content of the sources, tokenizer, settings); `datasets` maps them from disk. Cost:
tokenising runs at a few million tokens per second once, a hit costs the hash of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow
from datasets import Dataset

from fallow.errors import DataError
from fallow.training.cache import build_folder, cache_folder, digest_of
from fallow.training.packing import Pair, Rows, in_batches, pack_pairs, pack_text
from fallow.training.recipe import Recipe
from fallow.training.sources import Document, Fields, Source, find, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_FEW_DOCUMENTS = 20
_ROWS_PER_WRITE = 1024


@dataclass(kw_only=True, slots=True)
class Data:
    """Packed rows with columns input_ids, position_ids, labels (int64 tensors of length seq_len each)."""

    train: Dataset
    """Rows to train on."""
    evaluation: Dataset
    """Held-out rows."""
    summary: dict[str, Any]
    """`train_tokens`, `eval_tokens`, `files`, `digest`, `largest_id`: what run.json says of the data."""


@dataclass(kw_only=True, slots=True)
class Text:
    """What a recipe reads, before any tokenizer."""

    train: list[Source]
    """Where the text to train on is."""
    held_out: list[Source]
    """Where the held-out text is; empty: a part of the training text."""
    fields: Fields
    """Which fields of a row are read."""
    fraction: float
    """Share of the training text held out where there is no other."""

    @classmethod
    def of(cls, recipe: Recipe) -> Text:
        """The text of a recipe, found and hashed but not read. Raises DataError: an entry matches nothing."""
        fields = Fields(
            task=recipe.task,
            text=recipe.text_field,
            prompt=recipe.prompt_field,
            answer=recipe.answer_field,
            encoding_errors=recipe.encoding_errors,
        )
        return cls(
            train=find(recipe.train_data),
            held_out=find(recipe.eval_data),
            fields=fields,
            fraction=recipe.eval_fraction,
        )

    def identity(self) -> list[Any]:
        """What decides `documents`, for a cache key."""
        return [
            [s.digest for s in self.train],
            [s.digest for s in self.held_out],
            self.fraction if not self.held_out else None,
            [self.fields.task, self.fields.wanted(), self.fields.encoding_errors],
        ]

    def documents(self) -> tuple[list[Document], list[Document]]:
        """(to train on, held out); they share no text. Raises DataError: nothing to read, bad bytes, missing field."""
        train = list(read(self.train, self.fields))
        if not train:
            raise DataError(f"training data is empty: {_names(self.train)}; name files with text in them")
        return (train, list(read(self.held_out, self.fields))) if self.held_out else _split(train, self.fraction)


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Data:
    """The data of a recipe, from the cache where it is there.

    Args:
        recipe: names the data and how to pack it.
        tokenizer: of the model.
        vocab: rows of the model's embedding; every token id must be below it.

    Raises:
        DataError: nothing to read, too little for one sequence, bad bytes, a missing field, or token ids the model
            has no embedding for. One line, with the mend.
    """
    text = Text.of(recipe)
    key = digest_of(_FORMAT, text.identity(), recipe.seq_len, _fingerprint(tokenizer))
    folder = build_folder(cache_folder("data") / key, lambda target: _build(target, text, recipe, tokenizer))
    summary = json.loads((folder / "summary.json").read_text())
    if summary["largest_id"] >= vocab:
        raise DataError(
            f"the tokenizer gives ids up to {summary['largest_id']}, but the model has {vocab} embeddings;"
            " use the tokenizer that belongs to the model, or resize its embeddings"
        )
    summary["files"] = [s.name for s in (*text.train, *text.held_out)]
    summary["digest"] = key
    return Data(train=_open(folder / "train.arrow"), evaluation=_open(folder / "eval.arrow"), summary=summary)


def _build(target: Path, text: Text, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    train_documents, eval_documents = text.documents()
    train, held_out = text.train, text.held_out
    largest, counts = 0, {}
    for part, documents, sources in (("train", train_documents, train), ("eval", eval_documents, held_out or train)):
        rows = _pack(documents, text.fields, recipe.seq_len, tokenizer)
        if not len(rows.input_ids):
            raise DataError(_too_short(part, documents, sources, recipe, tokenizer, own=bool(held_out)))
        largest = max(largest, int(rows.input_ids.max()))
        counts[part] = int(rows.input_ids.size)
        _write(target / f"{part}.arrow", rows)
    summary = {"train_tokens": counts["train"], "eval_tokens": counts["eval"], "largest_id": largest}
    (target / "summary.json").write_text(json.dumps(summary))


def _split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out whole documents in the order of their hash (the same ones on every machine), or the tails of a few."""
    if len(documents) < _FEW_DOCUMENTS and "text" in documents[0]:
        pairs = [_cut(document["text"], fraction) for document in documents]
        return [{"text": head} for head, _ in pairs], [{"text": tail} for _, tail in pairs]
    order = sorted(documents, key=lambda d: hashlib.sha256("\0".join(d.values()).encode()).digest())
    wanted = fraction * sum(sum(map(len, d.values())) for d in documents)
    held, size = 0, 0
    while size < wanted and held < len(order) - 1:
        size += sum(map(len, order[held].values()))
        held += 1
    chosen = {id(d) for d in order[:held]}
    return [d for d in documents if id(d) not in chosen], order[:held]


def _cut(text: str, fraction: float) -> tuple[str, str]:
    at = int(len(text) * (1 - fraction))
    line_end = text.find("\n", at)
    at = line_end + 1 if 0 <= line_end < at + (len(text) - at) // 2 else at
    return text[:at], text[at:]


def _pack(documents: list[Document], fields: Fields, seq_len: int, tokenizer: PreTrainedTokenizerBase) -> Rows:
    if fields.task == "clm":
        return pack_text(_tokenise(documents, tokenizer), seq_len)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pack_pairs(_tokenise_pairs(documents, tokenizer), seq_len, int(pad or 0))  # type: ignore[arg-type]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = True) -> list[list[int]]:
    return cast("list[list[int]]", tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return None if tokenizer.eos_token_id is None else int(cast("int", tokenizer.eos_token_id))


def _tokenise(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    end = _end(tokenizer)
    for batch in in_batches(documents, 256):
        for ids in _ids(tokenizer, [d["text"] for d in batch]):
            yield ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _tokenise_pairs(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterable[Pair]:
    chat = bool(tokenizer.chat_template)
    for batch in in_batches(documents, 256):
        texts = [_as_chat(d, tokenizer) if chat else (d["prompt"] + "\n", d["answer"]) for d in batch]
        prompts = _ids(tokenizer, [p for p, _ in texts], special=not chat)
        answers = _ids(tokenizer, [a for _, a in texts], special=False)
        end = _end(tokenizer)
        for prompt, answer in zip(prompts, answers, strict=True):
            if not chat and prompt and prompt[-1] == end:
                prompt = prompt[:-1]
            yield Pair(prompt, answer if end is None or end in answer else [*answer, end])


def _as_chat(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and answer as the chat template writes them; the answer is what the second turn adds to the first."""
    user = {"role": "user", "content": document["prompt"]}
    turn = {"role": "assistant", "content": document["answer"]}
    head = str(tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False))
    whole = str(tokenizer.apply_chat_template([user, turn], tokenize=False))
    if not whole.startswith(head):
        raise DataError(
            "the tokenizer's chat template changes the prompt once an answer follows, so the answer cannot be told"
            " apart; set tokenizer.chat_template to one that only appends"
        )
    return head, whole[len(head) :]


def _too_short(
    part: str,
    documents: list[Document],
    sources: Sequence[Source],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    own: bool,
) -> str:
    where = _names(sources)
    if recipe.task == "sft":
        return f"{part} data has no answer that fits in seq_len={recipe.seq_len} tokens: {where}; raise seq_len"
    count = sum(map(len, _tokenise(documents, tokenizer)))
    mend = "add text or lower seq_len" if part == "train" or own else "raise eval_fraction or name eval_data"
    return f"{part} data has {count} tokens, fewer than one sequence of seq_len={recipe.seq_len}: {where}; {mend}"


def _names(sources: Sequence[Source]) -> str:
    names = [s.name for s in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return digest_of(rules, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _write(path: Path, rows: Rows) -> None:
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in Rows._fields])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(rows.input_ids), _ROWS_PER_WRITE):
            chunk = [list(column[start : start + _ROWS_PER_WRITE]) for column in rows]
            writer.write_batch(
                pyarrow.record_batch([pyarrow.array(c, schema.field(0).type) for c in chunk], schema=schema)
            )


def _open(path: Path) -> Dataset:
    return Dataset.from_file(str(path)).with_format("torch")
