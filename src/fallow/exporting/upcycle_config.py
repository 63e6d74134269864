"""The config of an exported Upcycle model, and what `AutoModelForCausalLM` calls for it.

config.json holds the stock config under `text_config`, where transformers' own composite models have theirs, so that
tools find context length and vocabulary, and what is fallow's under `fallow`. A stock config with one more field would
load everywhere, and there dense and without a word. This file is imported in the middle of transformers' own import, so
it imports no more of it than configs.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fallow.errors import CheckpointError, ConfigError

FORMAT = 1


class UpcycleConfig(PreTrainedConfig):
    """Attributes:

    text_config: the config of the stock model.
    fallow: "format", "version" of the fallow that wrote it, "int8" (the layers whose FFN weights are `Int8Linear`'s),
        and "upcycle", the settings of `fallow.Upcycle`.
    """

    model_type = "fallow_upcycle"
    has_no_defaults_at_init = True

    def __init__(
        self, text_config: PreTrainedConfig | None = None, fallow: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.text_config = text_config or PreTrainedConfig()
        self.fallow = fallow or {}
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the stock config's: what the caller changes (`attn_implementation`, `dtype`, any field) is changed there.

        Raises:
            CheckpointError: it is not what `--to fallow` writes, or of an unknown version.
            ConfigError: this transformers does not know the stock model.
        """
        try:
            text, about = dict(config_dict["text_config"]), dict(config_dict["fallow"])
            version, kind = about["format"], text["model_type"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError("config.json of an exported Upcycle model is corrupt; export it again") from None
        if version != FORMAT:
            raise CheckpointError(
                f"this Upcycle export is of format {version!r}, this fallow reads {FORMAT}; use the fallow that wrote"
                f" it ({about.get('version')})"
            )
        if kind not in CONFIG_MAPPING:
            raise ConfigError(f"this transformers knows no model of type {kind!r}; install a newer one")
        both = kwargs.pop("return_unused_kwargs", False)
        answer: Any = CONFIG_MAPPING[kind].from_dict(text, return_unused_kwargs=True, **kwargs)
        stock, unused = answer
        rest = {k: v for k, v in config_dict.items() if k not in ("text_config", "fallow", "model_type")}
        config = cls(stock, about, **rest)
        config.name_or_path = stock.name_or_path
        return (config, unused) if both else config


class UpcycledForCausalLM:
    """Never made: its `from_pretrained` returns a model of the stock class with an Upcycle on it."""

    config_class = UpcycleConfig

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: UpcycleConfig, **kwargs: Any) -> Any:
        """See `fallow.exporting.upcycled.load`."""
        from fallow.exporting.upcycled import load

        return load(name, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: UpcycleConfig, **kwargs: Any) -> Any:
        raise ConfigError(
            "an exported Upcycle model is its weights and its predictors, so a config alone makes none; use"
            " AutoModelForCausalLM.from_pretrained, or from_config(config.text_config) for the stock model"
        )
