"""A fallow model as lm-eval knows models: importing this file registers it there under the name `fallow`.

    import fallow.evaluation.harness
    lm_eval.simple_evaluate(model="fallow", model_args="pretrained=runs/x/upcycle,mode=sparse", tasks=["arc_easy"])

It is lm-eval's own Hugging Face model with a mode around every request, so prompts, stopping and scores are lm-eval's.
One thing is faster: lm-eval lets RULER generate up to 128 tokens although its score only asks whether every answer
occurs in them; here generation ends when all have occurred, which cannot change the score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from fallow.errors import ConfigError, DataError
from fallow.evaluation import lm_eval_door
from fallow.evaluation.subject import Subject, load
from fallow.method import Mode

_registry = lm_eval_door.module("api.registry")
_huggingface = lm_eval_door.module("models.huggingface")
_evaluator = lm_eval_door.module("evaluator")


class _Answered(StoppingCriteria):
    """Every wanted string has occurred in what was generated."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, wanted: Sequence[str]) -> None:
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens
        self.wanted = [text.lower() for text in wanted]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        said = self.tokenizer.decode(input_ids[0, self.prompt_tokens :], skip_special_tokens=True).lower()
        done = all(text in said for text in self.wanted)
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


@_registry.register_model("fallow")
class FallowLM(_huggingface.HFLM):  # type: ignore[misc, name-defined]  # lm-eval is imported through its door
    """A `Subject` in one mode.

    Args:
        pretrained: a `Subject`, or what `fallow evaluate` takes as MODEL.
        mode: "sparse", or "dense": the same weights, all of them computed.
        batch_size: requests per forward pass.
        precision: "auto", "bf16" or "fp32".
        device: "cpu", "cuda"; None: a GPU where there is one.

    Raises:
        ConfigError: no such model, or sparse was asked of a dense one.
    """

    def __init__(
        self,
        pretrained: str | Subject,
        mode: Mode = "sparse",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        if isinstance(pretrained, str):
            pretrained = load(pretrained, verb="lm-eval", precision=precision, device=device)
        self.subject: Subject = pretrained
        self.fallow_mode: Mode = mode
        self._wanted: Sequence[str] | None = None
        with pretrained.evaluated(mode):  # refuses a mode that the model has not
            pass
        super().__init__(
            pretrained=pretrained.model,
            tokenizer=pretrained.tokenizer,
            backend="causal",
            batch_size=batch_size or 1,
            max_batch_size=max_batch_size,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self.subject.evaluated(self.fallow_mode):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self.subject.evaluated(self.fallow_mode):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self.subject.evaluated(self.fallow_mode):
            if self.batch_size != 1 or not all("gen_prefix" in (r.doc or {}) for r in requests):
                return super().generate_until(requests, disable_tqdm=disable_tqdm)
            return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> str:
        """One RULER document."""
        self._wanted = request.doc["outputs"]
        try:
            return super().generate_until([request], disable_tqdm=True)[0]
        finally:
            self._wanted = None

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        if self._wanted is None:
            return super()._model_generate(context, max_length, stop, **kwargs)
        ends = StoppingCriteriaList([_Answered(self.tokenizer, context.shape[1], self._wanted)])
        end = self.tokenizer.eos_token_id
        return self.model.generate(
            input_ids=context,
            attention_mask=kwargs.get("attention_mask"),
            max_length=max_length,
            do_sample=False,
            stopping_criteria=ends,
            eos_token_id=end,
            pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            use_cache=True,
        )


def evaluate(lm: FallowLM, tasks: dict[str, Any], *, limit: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Task objects of lm-eval on a model: what lm-eval logs of each document, by the tasks' names."""
    with lm_eval_door.silence():
        found = _evaluator.evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    return found["samples"]


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's task objects of these names, groups and tags.

    Raises:
        ConfigError: lm-eval has no such task.
        DataError: a task's data set cannot be fetched.
    """
    manager = lm_eval_door.module("tasks").TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            import difflib

            near = difflib.get_close_matches(name, ["ruler", "perplexity", *manager.all_tasks], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `lm-eval ls tasks`"
            raise ConfigError(f"--tasks {name}: neither fallow nor lm-eval has such a task; {hint}")
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            with lm_eval_door.silence():
                tasks |= manager.load([name])["tasks"]
        except Exception as error:  # the hub client raises a dozen kinds, all of which mean the same to the user
            first = " ".join(str(error).split())[:160]
            raise DataError(
                f"task {name}: its data could not be loaded ({type(error).__name__}: {first}); it needs the hub, or its"
                " data set in the cache"
            ) from None
    return tasks


def per_document(samples: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> list[float]:
    """One number of each document, in the order of the documents."""
    return [float(value(s)) for s in sorted(samples, key=lambda s: s["doc_id"])]
