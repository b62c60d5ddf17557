"""Every way to choose a code and to learn one. Whichever of these modules is imported, all names are known."""

from bavq.quantizers import adapters as _adapters  # noqa: F401, each registers its quantizers
from bavq.quantizers import ba_vq as _ba_vq  # noqa: F401
from bavq.quantizers import composite as _composite  # noqa: F401
from bavq.quantizers import remedies as _remedies  # noqa: F401
from bavq.quantizers import searchless as _searchless  # noqa: F401
from bavq.quantizers import specified as _specified  # noqa: F401
from bavq.quantizers import vq_ema as _vq_ema  # noqa: F401
