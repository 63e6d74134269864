"""Data: documents kept apart, loss where it belongs, the cache, and one-line errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from fallow.errors import DataError
from fallow.training import data, sources
from fallow.training.models import documents_stay_apart
from fallow.training.packing import IGNORED, Pair, pack_pairs, pack_text
from fallow.training.settings import resolve
from tests.tiny_models import FAMILIES, tiny_model
from tests.training.tiny_runs import VOCAB, text, tokenizer


def prepare(**changes: Any) -> data.Data:
    recipe = resolve({"seq_len": 32, "eval_fraction": 0.2} | changes, {})
    return data.prepare(recipe, tokenizer(chat=recipe.task == "sft"), VOCAB)


def test_packed_text_is_every_token_in_order_with_positions_per_document() -> None:
    rows = pack_text([[1, 2, 3], [4, 5], [], [6, 7, 8, 9]], seq_len=4)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert rows.labels.tolist() == [[IGNORED, 2, 3, IGNORED], [IGNORED, IGNORED, 7, 8]]


@given_settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=120), st.integers(4, 12))
def test_packed_pairs_lose_nothing_that_fits(lengths: list[tuple[int, int]], seq_len: int) -> None:
    pairs = [Pair([10 + i] * p, [1000 + i] * a) for i, (p, a) in enumerate(lengths)]
    rows = pack_pairs(pairs, seq_len, pad_id=0)
    kept = [(p, a[: max(0, seq_len - len(p))]) for p, a in pairs]
    answers = np.concatenate([np.array(a) for p, a in kept]) if kept else np.array([])
    first = np.array([1000 + i for i, (p, a) in enumerate(kept) if not p and a])  # without prompt, it follows nothing
    expected = sorted([*answers.tolist()])
    found = sorted([*rows.labels[rows.labels != IGNORED].tolist(), *first.tolist()])
    assert found == expected
    assert (rows.labels[:, 0] == IGNORED).all()
    assert ((rows.labels == IGNORED) | (rows.labels == rows.input_ids)).all()
    assert ((rows.position_ids[:, 1:] == 0) | (np.diff(rows.position_ids, axis=1) == 1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_a_row_do_not_see_each_other(family: str) -> None:
    """The loss of a packed row equals the loss of its documents one by one, in every family but OPT; and we know it."""
    model = tiny_model(family).eval()
    assert documents_stay_apart(model) == (family != "opt")
    if family == "opt":
        return
    documents = [list(range(3, 14)), list(range(40, 61))]
    rows = pack_text(documents, seq_len=32)
    ids, positions, labels = (torch.from_numpy(column).long() for column in rows)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss * 30
        apart = sum(
            float(model(input_ids=torch.tensor([d]), labels=torch.tensor([d]), use_cache=False).loss) * (len(d) - 1)
            for d in documents
        )
    assert float(packed) == pytest.approx(apart, rel=1e-5)


def test_loss_on_answers_only_through_the_chat_template(tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}?", "answer": f"it is {i * i}"} for i in range(60)]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(train_data=str(path), task="sft", prompt_field="question", seq_len=96)
    tok = tokenizer(chat=True)
    texts = []
    for part in (found.train, found.evaluation):
        for row in part:
            ids, labels, positions = row["input_ids"], row["labels"], row["position_ids"]
            starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
            for start, end in itertools.pairwise(starts):
                piece = ids[start:end]
                answer = piece[labels[start:end] != IGNORED]
                if len(answer):
                    texts.append((tok.decode(piece), tok.decode(answer)))
    expected = {(f"<|user|>what is {i}?</s><|assistant|>it is {i * i}</s>", f"it is {i * i}</s>") for i in range(60)}
    assert set(texts) == expected and len(texts) == 60


def test_the_cache_is_keyed_by_content_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text(1, 400))
    first = prepare(train_data=[str(path)])
    built: list[str] = []
    build = data._build
    monkeypatch.setattr(data, "_build", lambda target, *rest: (built.append("built"), build(target, *rest)))
    again = prepare(train_data=[str(path)])
    assert not built and again.summary == first.summary
    prepare(train_data=[str(path)], seq_len=16)
    path.write_text(text(2, 400))
    assert prepare(train_data=[str(path)]).summary["digest"] != first.summary["digest"]
    assert len(built) == 2


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i:03d} " * 30)
    found = prepare(train_data=[str(tmp_path)])
    tok = tokenizer()

    def numbers(part: datasets.Dataset) -> set[str]:
        return {w for row in part for w in tok.decode(row["input_ids"]).replace("</s>", " ").split() if len(w) == 3}

    train, held = numbers(found.train), numbers(found.evaluation)
    assert 6 <= len(held) <= 9 and 30 <= len(train) <= 34
    assert not train & held


def test_every_kind_of_file_and_a_glob(tmp_path: Path) -> None:
    words = {
        name: f"{name} " + text(i, 200) for i, name in enumerate(["txt", "md", "rst", "py", "html", "jsonl", "pq"])
    }
    for kind in ("txt", "md", "rst", "py"):
        (tmp_path / f"a.{kind}").write_text(words[kind])
    page = f"<html><head><title>no</title><script>var no</script></head><p>{words['html']}</p><p>a &amp; b</p></html>"
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": words["jsonl"]}) + "\n")
    datasets.Dataset.from_dict({"text": [words["pq"]]}).to_parquet(str(tmp_path / "a.parquet"))
    found = list(sources.read(sources.find([str(tmp_path)]), sources.Fields()))
    assert sorted(d["text"].split()[0] for d in found) == sorted(words)
    html = next(d["text"] for d in found if d["text"].startswith("html"))
    assert "no" not in html.split() and html.endswith("a & b")
    assert len(sources.find([str(tmp_path / "*.txt"), str(tmp_path / "a.md")])) == 2


def test_python_reference_is_the_running_pythons(tmp_path: Path) -> None:
    path = sources.python_reference()
    documents = [json.loads(line)["text"] for line in path.open()]
    assert len(documents) > 200 and sum(map(len, documents)) > 1_000_000
    assert any("Assignment statements" in d for d in documents)
    assert any(d.startswith("argparse") and "ArgumentParser" in d for d in documents)


def test_bad_bytes_name_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(text(0, 300).encode() + b"caf\xe9 " + text(1, 300).encode())
    offset = len(text(0, 300)) + 3
    with pytest.raises(DataError, match=rf"latin.txt: byte 0xe9 at offset {offset} .*encoding_errors: replace"):
        prepare(train_data=[str(path)])
    assert prepare(train_data=[str(path)], encoding_errors="replace").summary["train_tokens"] > 0


@pytest.mark.parametrize(
    ("content", "name", "changes", "message"),
    [
        ("", "a.txt", {}, "training data is empty: .*a.txt"),
        ("one line\n", "a.txt", {}, "train data has 8 tokens, fewer than one sequence of seq_len=32.*lower seq_len"),
        ("word " * 20, "a.txt", {"eval_fraction": 0.01}, "eval data has .* raise eval_fraction or name eval_data"),
        ('{"body": "x"}\n', "a.jsonl", {}, r"row 1: field 'text' is missing \(the row has: body\); set text_field"),
        ('{"text": 3}\n', "a.jsonl", {}, "row 1: field 'text' is no text"),
        ('{"text": "x"}\n{"text\n', "a.jsonl", {}, "line 2 is no valid JSON"),
        ('{"prompt": "x"}\n', "a.jsonl", {"task": "sft"}, "field 'answer' is missing .* set answer_field"),
        ("text", "a.txt", {"task": "sft"}, "task sft needs prompt and answer rows"),
        ("no parquet", "a.parquet", {}, "no readable parquet file"),
        ("x", "a.docx", {}, "unknown kind of file"),
    ],
)
def test_bad_data_is_one_line_with_the_mend(
    tmp_path: Path, content: str, name: str, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(train_data=[str(path)], **changes)
    assert "\n" not in str(caught.value)


def test_missing_files_and_a_foreign_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        prepare(train_data=[str(tmp_path / "none.txt")])
    (tmp_path / "a.txt").write_text(text(0, 300))
    recipe = resolve({"seq_len": 32, "train_data": [str(tmp_path / "a.txt")], "eval_fraction": 0.2}, {})
    with pytest.raises(DataError, match=r"ids up to \d+, but the model has 200 embeddings"):
        data.prepare(recipe, tokenizer(), 200)
