"""Documents -> token rows of one length, with the boundaries between documents kept.

Padding every document to the longest wastes most of the compute, and gluing them together lets each read the one
before. Here rows are full and `position_ids` restart at 0 with each document; given no attention mask, stock
transformers (masking_utils.find_packed_sequence_indices) turns that into a block-diagonal causal mask. The first
token of a document is never predicted (label -100): nothing before it belongs to it. Cost: one pass over the tokens.

T is the row length, N the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

IGNORED = -100
_OPEN_ROWS = 64


class Rows(NamedTuple):
    """Packed token rows, each array int32 of shape [N, T]."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray


class Pair(NamedTuple):
    """One instruction example as token ids."""

    prompt: list[int]
    answer: list[int]


def pack_text(documents: Iterable[Sequence[int]], seq_len: int) -> Rows:
    """Concatenate documents and cut rows of `seq_len`; what is left of the last row is dropped.

    A document that is cut continues in the next row as if it began there: what came before is out of reach.
    """
    ids = [np.asarray(d, dtype=np.int32) for d in documents if len(d)]
    stream = np.concatenate(ids) if ids else np.empty(0, np.int32)
    starts = np.zeros(len(stream), dtype=bool)
    if ids:
        starts[np.cumsum([0] + [len(d) for d in ids[:-1]])] = True
    count = len(stream) // seq_len
    ids_NT = stream[: count * seq_len].reshape(count, seq_len)
    positions_NT = _positions(starts[: count * seq_len].reshape(count, seq_len))
    labels_NT = np.where(positions_NT == 0, np.int32(IGNORED), ids_NT)
    return Rows(ids_NT, positions_NT, labels_NT)


def pack_pairs(pairs: Iterable[Pair], seq_len: int, pad_id: int) -> Rows:
    """Put whole examples into rows, first fit over the last 64 open rows; loss on answer tokens only.

    An example longer than a row keeps its beginning; one whose prompt alone fills the row has no answer left and is
    dropped. Empty places hold `pad_id` as a document of its own, without loss.
    """
    done: list[list[Pair]] = []
    open_rows: list[tuple[int, list[Pair]]] = []
    for pair in pairs:
        pair = Pair(pair.prompt, pair.answer[: max(0, seq_len - len(pair.prompt))])
        length = len(pair.prompt) + len(pair.answer)
        if not pair.answer:
            continue
        for i, (used, members) in enumerate(open_rows):
            if used + length <= seq_len:
                members.append(pair)
                open_rows[i] = (used + length, members)
                break
        else:
            open_rows.append((length, [pair]))
        if len(open_rows) > _OPEN_ROWS:
            fullest = max(range(len(open_rows)), key=lambda i: open_rows[i][0])
            done.append(open_rows.pop(fullest)[1])
    done += [members for _, members in open_rows]
    ids_NT = np.full((len(done), seq_len), pad_id, dtype=np.int32)
    labels_NT = np.full((len(done), seq_len), IGNORED, dtype=np.int32)
    starts_NT = np.zeros((len(done), seq_len), dtype=bool)
    for row, members in enumerate(done):
        at = 0
        for pair in members:
            starts_NT[row, at] = True
            end = at + len(pair.prompt) + len(pair.answer)
            ids_NT[row, at:end] = [*pair.prompt, *pair.answer]
            labels_NT[row, at + max(1, len(pair.prompt)) : end] = ids_NT[row, at + max(1, len(pair.prompt)) : end]
            at = end
        if at < seq_len:
            starts_NT[row, at] = True
    return Rows(ids_NT, _positions(starts_NT), labels_NT)


def _positions(starts_NT: np.ndarray) -> np.ndarray:
    """Position of each token in its document, restarting at every row."""
    count, seq_len = starts_NT.shape
    place_T = np.arange(seq_len, dtype=np.int32)
    latest_NT = np.maximum.accumulate(np.where(starts_NT, place_T, 0), axis=1) if count else starts_NT
    return (place_T - latest_NT).astype(np.int32).reshape(count, seq_len)


def in_batches(items: Iterable[dict[str, str]], size: int) -> Iterator[list[dict[str, str]]]:
    """Lists of up to `size` items."""
    batch: list[dict[str, str]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
