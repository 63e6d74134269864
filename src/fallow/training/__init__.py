"""One run from recipe to result: data, model, trainer, meters, checkpoints; and several runs compared."""
