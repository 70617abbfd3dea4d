"""fedq on Flower (flwr 1.42 or later): messages of fedq inside a Flower app; needs the extra `fedq[flower]`."""

from fedq.errors import MissingPackage

try:
    import flwr.app
except ImportError as error:
    raise MissingPackage('fedq.integrations.flower needs Flower: pip install "fedq[flower]"') from error

from fedq.integrations.flower.mod import compression
from fedq.integrations.flower.strategy import Compressed

__all__ = ["Compressed", "compression"]

del flwr
