"""`Slot`: a module that stands where a stock module stood, sharing all of its state, and computes something else.

The obvious alternatives are to patch the class (touches every model of the process) or to assign `module.forward`
(breaks `torch.compile`, pickling and device hooks). A slot instead takes the stock module's place in its parent. It
shares the stock module's own `_parameters`, `_modules`, `_buffers` and hook dictionaries, not copies of them: keys of
`state_dict()`, parameter identity, hooks and what FSDP2 or `.to()` write into a module are the same for both, whichever
came first. Costs one Python object per swapped module, and no memory for tensors.
"""

from __future__ import annotations

from torch import nn

from fallow.errors import ConfigError, UnsupportedModelError


class Slot(nn.Module):
    """Base of the modules fallow puts into a model. Subclasses define `forward`."""

    def __init__(self, stock: nn.Module, name: str) -> None:
        """Share the state of `stock`, whose dotted name is `name`.

        Raises:
            ConfigError: `stock` is a slot itself. UnsupportedModelError: something replaced its forward already.
        """
        super().__init__()
        if isinstance(stock, Slot):
            raise ConfigError(f"{name} is swapped out already; uninstall() the view that holds it first")
        if "forward" in stock.__dict__ or stock.__dict__.get("_compiled_call_impl") is not None:
            raise UnsupportedModelError(
                f"{name} has a forward of its own (an accelerate device hook, or module.compile()); "
                "load the model without device_map offloading, and compile after sparsify()"
            )
        self.__dict__.update(stock.__dict__)
        object.__setattr__(self, "_slot_stock", (stock,))

    @property
    def stock(self) -> nn.Module:
        """The module this slot stands for; not registered as a child."""
        return self.__dict__["_slot_stock"][0]

    def place(self, parent: nn.Module, child: str) -> None:
        """Take the stock module's place under `parent`; the order of children does not change."""
        setattr(parent, child, self)
        object.__setattr__(self, "_slot_home", (parent, child))

    def remove(self) -> None:
        """Put the stock module back; it takes over the train/eval mode of the slot."""
        parent, child = self.__dict__["_slot_home"]
        self.stock.training = self.training
        setattr(parent, child, self.stock)


class PassThrough(Slot):
    """Keeps a module's parameters in the tree while its work is done elsewhere: returns its input."""

    def forward(self, x):
        return x
