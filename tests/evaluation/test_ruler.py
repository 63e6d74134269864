"""RULER's documents and scores, and fallow as lm-eval's model: reproducible, within their length, lm-eval's scores."""

from __future__ import annotations

import random

import pytest
import torch

from tests.evaluation.subjects import run_folder, subject

pytest.importorskip("lm_eval")

from fallow.errors import ConfigError
from fallow.evaluation import lm_eval_door, ruler
from fallow.evaluation.documents import SEEDED, TASKS, Document, make

LENGTH = 2048


@pytest.fixture(scope="module")
def tiny():
    return subject()


@pytest.mark.parametrize("task", [*TASKS, SEEDED])
def test_documents_are_reproducible_and_fit(tiny, task) -> None:
    given = {"length": LENGTH, "tokenizer": tiny.tokenizer}
    state = random.getstate()
    first = make(task, count=3, seed=0, **given)
    assert random.getstate() == state, "the caller's random state is left alone"
    make("ruler_cwe", count=2, seed=5, **given)  # what came before must not matter
    assert make(task, count=3, seed=0, **given) == first
    assert make(task, count=3, seed=1, **given) != first
    assert len({document.text for document in first}) == 3
    for document in first:
        room = 50 if task == "ruler_fwe" else 0  # lm-eval's FWE fills the length with the prompt alone
        assert len(tiny.tokenizer(document.prompt + document.answer).input_ids) <= LENGTH + room
        assert document.outputs and all(word in document.answer for word in document.outputs)
        assert all(word in document.text for word in document.outputs)


def test_seeded_documents_are_the_same_whatever_their_number(tiny) -> None:
    given = {"length": LENGTH, "seed": 0, "tokenizer": tiny.tokenizer}
    assert make(SEEDED, count=3, **given)[:2] == make(SEEDED, count=2, **given)


def test_prompts_are_lm_evals_own(tiny) -> None:
    for task in TASKS:
        (document,) = make(task, length=LENGTH, count=1, seed=0, tokenizer=tiny.tokenizer)
        built = ruler._task(task, [document])
        built.build_all_requests(rank=0, world_size=1)
        assert built.instances[0].args[0] == document.prompt


def test_scores_are_the_share_of_answers_said(tiny) -> None:
    """Documents whose answers are what this model does say, or does not; a random model answers nothing by itself."""
    prompts = [f"the cat sees {n} birds and" for n in range(3)]
    with tiny.evaluated("sparse") as model:
        said = []
        for prompt in prompts:
            ids = torch.tensor([tiny.tokenizer(prompt).input_ids])
            out = model.generate(ids, max_new_tokens=40, do_sample=False, use_cache=True, pad_token_id=0)
            said.append(tiny.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    words = [next(w for w in (s[i : i + 3] for i in range(30)) if w.isascii() and w.strip() == w) for s in said]
    wanted = [(words[0],), (words[1], "never said"), ("never said",)]
    documents = [
        Document(
            task="niah_single_1",
            length=512,
            number=n,
            text=p.rpartition(" ")[0],
            prefix=p.rpartition(" ")[2],
            outputs=w,
        )
        for n, (p, w) in enumerate(zip(prompts, wanted, strict=True))
    ]
    found = ruler.score(tiny, documents, mode="sparse")
    assert found.cells == {("niah_single_1", 512): [1.0, 0.5, 0.0]}
    assert found.at(512).mean == 0.5


def test_lm_eval_knows_the_model_by_name_and_gives_stock_scores(tmp_path) -> None:
    """The dense mode scores as lm-eval's own model on the same folder, and the sparse mode is another model."""
    import fallow.evaluation.harness  # noqa: F401  registers the model

    folder = run_folder(tmp_path / "run", subject(context=1024))
    door = lm_eval_door.module("evaluator")
    logs = {}
    for name, where, mode in (("hf", "run/model", ""), ("fallow", "run", "dense"), ("fallow", "run", "sparse")):
        place = f"pretrained={tmp_path / where}" + (f",mode={mode}" if mode else ",device=cpu")
        with lm_eval_door.silence():
            manager = lm_eval_door.module("tasks").TaskManager(include_path=_sums(tmp_path), include_defaults=False)
            found = door.simple_evaluate(
                model=name, model_args=place, tasks=["sums"], task_manager=manager, bootstrap_iters=0
            )
        logs[mode] = [s["resps"][0][0][0] for s in found["samples"]["sums"]]
    assert folder.is_dir() and len(logs[""]) == 3
    assert logs["dense"] == pytest.approx(logs[""], rel=1e-5)
    assert max(abs(a - b) for a, b in zip(logs["dense"], logs["sparse"], strict=True)) > 1e-2


def _sums(folder) -> str:
    """A tiny lm-eval task of likelihoods."""
    (folder / "sums.jsonl").write_text(
        '{"q": "one and one", "a": "two"}\n{"q": "a cat", "a": "sees"}\n{"q": "x", "a": "y"}'
    )
    (folder / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder}/sums.jsonl\ntest_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: " {{a}}"\nmetric_list:\n  - metric: acc\n'
    )
    return str(folder)


def test_bad_input_is_refused_with_the_mend(tiny, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="9000 tokens are beyond the context of tiny, 4096"):
        ruler.check(tiny, TASKS, [9000])
    with pytest.raises(ConfigError, match=r"too short.*longer --lengths"):
        make("ruler_cwe", length=300, count=1, seed=0, tokenizer=tiny.tokenizer)
    with pytest.raises(ConfigError, match="offline are ruler_cwe"):
        ruler.check(tiny, ["niah_single_2"], [1024])
    monkeypatch.setattr(lm_eval_door, "OLDEST", "99")
    with pytest.raises(ConfigError, match=r"lm-eval .* is installed, 99 .*pip install 'fallow\[eval\]'"):
        ruler.check(tiny, TASKS, [1024])


def test_without_lm_eval_the_error_names_the_extra(monkeypatch) -> None:
    import importlib.metadata

    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lm-eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'fallow\[eval\]'"):
        lm_eval_door.check()
