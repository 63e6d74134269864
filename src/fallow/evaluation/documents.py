"""RULER's documents, made here and now by lm-eval's own generators: six tasks that need no download.

lm-eval makes 500 documents of each length from one random state that all tasks share, so that what a document is
depends on what was asked before it. Here every (task, length, seed) starts its own state and only as many are made as
are used; held-out documents are another seed. `ruler_cwe_seeded` is the same task as `ruler_cwe` with a seed of its own
for every document, where answers lie at other places in each, for finding what a layer gets wrong where. RULER's
lengths include the room for the answer; below 4096 tokens common words come 6 times and others once.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fallow.errors import ConfigError
from fallow.evaluation import lm_eval_door

TASKS = ("ruler_cwe", "ruler_fwe", "ruler_vt", "niah_single_1", "niah_multikey_2", "niah_multikey_3")
"""The tasks of RULER that need no download, by lm-eval's names."""
SEEDED = "ruler_cwe_seeded"
"""Ours: `ruler_cwe` with a seed per document."""
ANSWER_ROOM = {"ruler_cwe": 120, SEEDED: 120, "ruler_fwe": 50, "ruler_vt": 30}
"""Tokens that lm-eval lets a task generate; 128 where it is not here."""
_EXAMPLE = 500
"""Tokens that lm-eval allows the example which `ruler_vt` shows first."""
_NEEDLES = {
    "niah_single_1": ("repeat", "words", "numbers"),
    "niah_multikey_2": ("needle", "words", "numbers"),
    "niah_multikey_3": ("needle", "uuids", "uuids"),
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Document:
    """One prompt and what is to be found in it."""

    task: str
    length: int
    """Tokens of prompt and answer together, at most."""
    number: int
    text: str
    prefix: str
    """How the answer begins."""
    outputs: tuple[str, ...]
    """What the answer must name."""

    @property
    def prompt(self) -> str:
        """What the model reads, as lm-eval puts it together."""
        return f"{self.text}\n\n{self.prefix}" if self.task in ("ruler_cwe", SEEDED) else f"{self.text} {self.prefix}"

    @property
    def answer(self) -> str:
        """The right answer in the form the model would give it."""
        if self.task in ("ruler_cwe", SEEDED):
            return " " + " ".join(f"{i}. {word}" for i, word in enumerate(self.outputs, start=1))
        return " " + (" " if self.task == "ruler_vt" else ", ").join(self.outputs)

    def row(self) -> dict[str, Any]:
        """As lm-eval's task takes it."""
        return {
            "index": self.number,
            "input": self.text,
            "outputs": list(self.outputs),
            "gen_prefix": self.prefix,
            "max_length": self.length,
        }


def make(task: str, *, length: int, count: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """`count` documents of one task and length; the same for the same arguments.

    Raises:
        ConfigError: unknown task, lm-eval missing, or a length too short for the task with this tokenizer.
    """
    known = (*TASKS, SEEDED)
    if task not in known:
        raise ConfigError(f"RULER task {task!r} is not one of those that need no download: {', '.join(known)}")
    _check_room(task, length, tokenizer)
    if task == SEEDED:
        rows = []
        for number in range(count):
            with _seeded(task, length, seed, number):
                rows += _cwe(1, length, tokenizer)
    else:
        with _seeded(task, length, seed):
            rows = _GENERATORS.get(task, lambda *given: _niah(task, *given))(count, length, tokenizer)
    if len(rows) < count or not all(row["outputs"] for row in rows):
        raise ConfigError(f"{task}: {length} tokens are too few for this task with this tokenizer; use longer ones")
    return [
        Document(
            task=task,
            length=length,
            number=number,
            text=row["input"],
            prefix=row["gen_prefix"],
            outputs=tuple(row["outputs"]),
        )
        for number, row in enumerate(rows)
    ]


def make_all(
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    count: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Document]:
    """Of every task at every length, in that order."""
    return [
        document
        for task in tasks
        for length in lengths
        for document in make(task, length=length, count=count, seed=seed, tokenizer=tokenizer)
    ]


def _check_room(task: str, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """lm-eval's generators shrink a document until it fits and never give up, so a hopeless length is told before."""
    room = ANSWER_ROOM.get(task, 128)
    if task in ("ruler_cwe", SEEDED):
        words = lm_eval_door.module("tasks.ruler.cwe_utils").WORDS
        template = lm_eval_door.module("tasks.ruler.cwe_utils").TEMPLATE
        entries = " ".join(f"{n}. {words[n]}" for n in range(110))  # an example of 40, a list of 60, ten answers
        least = room + _tokens(template * 2 + entries, tokenizer)
    elif task == "ruler_vt":
        shown = _assignments(5, tokenizer) + room
        least = _assignments(10, tokenizer) + room + _EXAMPLE
        if shown > _EXAMPLE:
            raise ConfigError(
                f"ruler_vt shows an example of {_EXAMPLE} tokens, here it takes {shown} (tokenizer); use other tasks"
            )
    else:
        needle = "One of the special magic numbers for 6b2e9c1e-2c5a-4f0b-9c5e-0d5b7a8e1f23 is: 1234567.\n"
        template = lm_eval_door.module("tasks.ruler.niah_utils").TEMPLATE
        least = room + _tokens(template + needle * 7, tokenizer)
    if length < least:
        raise ConfigError(
            f"{task}: documents of {length} tokens are too short, with this tokenizer it takes about"
            f" {-(-least // 256) * 256}; use longer --lengths"
        )


def _assignments(sentences: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a document about variables with so many sentences of noise, and a tenth more."""
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    template = lm_eval_door.module("tasks.ruler.vt_utils").TEMPLATE
    text = template + noise * sentences + " VAR QWXYZ = VAR ZYXWQ " * 5 + " 'QWXYZ'," * 5
    return _tokens(text, tokenizer) * 11 // 10


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text).input_ids)  # type: ignore[arg-type]


@contextmanager
def _seeded(*parts: object) -> Iterator[None]:
    """The global random states, and the one inside lm-eval's CWE, begun from these parts; afterwards as before."""
    own = lm_eval_door.module("tasks.ruler.cwe_utils").RNG
    seed = zlib.crc32(repr(parts).encode())
    before = random.getstate(), np.random.get_state(), own.getstate()
    random.seed(seed)
    np.random.seed(seed)
    own.seed(seed)
    try:
        with lm_eval_door.silence():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        own.setstate(before[2])


Generator = Callable[[int, int, PreTrainedTokenizerBase], list[dict[str, Any]]]


def _cwe(count: int, length: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    make = lm_eval_door.module("tasks.ruler.cwe_utils").sys_word_pair_random
    return make(num_samples=count, max_seq_length=length, tokenizer=tokenizer)


def _fwe(count: int, length: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    make = lm_eval_door.module("tasks.ruler.fwe_utils").sys_kwext
    return make(tokenizer, max_seq_length=length, num_samples=count)


def _vt(count: int, length: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    make = lm_eval_door.module("tasks.ruler.vt_utils").sys_vartrack_w_noise_random
    (example,) = make(tokenizer=tokenizer, num_samples=1, max_seq_length=_EXAMPLE, incremental=5)
    return make(tokenizer=tokenizer, num_samples=count, max_seq_length=length, icl_example=example)


def _niah(task: str, count: int, length: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    made = lm_eval_door.module("tasks.ruler.prepare_niah")
    haystack, keys, values = _NEEDLES[task]
    return made.generate_samples(
        made.get_haystack(haystack),
        max_seq_length=length,
        template=lm_eval_door.module("tasks.ruler.niah_utils").TEMPLATE,
        type_haystack=haystack,
        type_needle_k=keys,
        type_needle_v=values,
        num_samples=count,
        TOKENIZER=tokenizer,
    )


_GENERATORS: dict[str, Generator] = {"ruler_cwe": _cwe, "ruler_fwe": _fwe, "ruler_vt": _vt}
