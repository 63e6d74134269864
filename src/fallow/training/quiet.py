"""Turns off the chatter of the Hugging Face libraries, for our commands only: importing fallow never does this."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Progress bars and informational logs off; errors stay."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("accelerate", "trl", "torch.distributed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(transformers|trl|accelerate|datasets|torch)\b")
