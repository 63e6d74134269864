"""TRL's SFTTrainer with fallow's behaviour (`task: sft`). Kept apart because trl is an optional extra.

Data comes packed and labelled already (packing.py), so TRL's own preparation is skipped; its model card and telemetry
too.
"""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from fallow.training.trainer import RunMixin


class InstructionTrainer(RunMixin, SFTTrainer):
    """Answers prompts, with loss on the answers only."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card is written into run folders."""

    def _send_telemetry(self) -> None:
        """A training run makes no network request."""


def instruction_arguments(settings: dict[str, Any]) -> SFTConfig:
    """`settings` (keywords of TrainingArguments) as TRL's config, with its data preparation off."""
    data: dict[str, Any] = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(**settings, **data)
