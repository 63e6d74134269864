"""One folder per method; importing this package joins each config class to its method."""

from fallow.methods import sat as sat
from fallow.methods import smet as smet
from fallow.methods import ssd as ssd
from fallow.methods import upcycle as upcycle
