"""Bad settings are refused at construction, with the mend in the message."""

from __future__ import annotations

import pytest

import fallow
from fallow import SAT
from fallow.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"omit": 1.0}, "0 <= omit < 1"),
        ({"omit": -0.1}, "0 <= omit < 1"),
        ({"omit": "half"}, "0 <= omit < 1"),
        ({"heads": 1.5}, "0 <= heads < 1"),
        ({"importance": "movement"}, "uniform, magnitude, wanda, maxip, activation or a callable"),
        ({"importance": 3}, "name or a callable"),
        ({"selection": "best"}, "'topk', 'sample'"),
        ({"scope": "token"}, "'batch', 'sequence'"),
        ({"omit_in": "forward"}, "'forward\\+backward', 'backward', 'weight_grad'"),
        ({"dense_tokens": "prompt"}, "'loss'"),
        ({"layer_rates": "early"}, "'uniform', 'late', 'sensitivity'"),
        ({"layer_rates": []}, "one weight >= 0 per layer"),
        ({"refresh_every": 0}, "at least 1"),
        ({"sample_tokens": 0}, "at least 1"),
        ({"ladder": 5, "dense_share": 0.5}, "dense_share <= 0.200"),
        ({"dense_tokens": "loss", "lazy": True}, "lazy=False"),
        ({"dense_tokens": "loss", "scope": "sequence"}, "scope='batch'"),
        ({"omit_in": "backward", "heads": 0.5}, "heads=0"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SAT(**settings)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError):
        SAT(0.5)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, fallow.FallowError)
