"""Vector quantizers that use their codebook, measured honestly: Blahut-Arimoto VQ beside VQ-EMA."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bavq.core.config import RunConfig
    from bavq.core.errors import BavqError
    from bavq.evaluation.evaluate import evaluate
    from bavq.models.vqvae import VQVAE
    from bavq.models.vqvae2 import VQVAE2
    from bavq.quantizers.adapters import as_vector_quantize, from_vector_quantize
    from bavq.quantizers.ba_vq import BAQuantizer
    from bavq.quantizers.base import Quantized, Quantizer, VectorQuantizer, make_quantizer, register_quantizer
    from bavq.quantizers.composite import ProductQuantizer, ResidualQuantizer
    from bavq.quantizers.contract import check_quantizer
    from bavq.quantizers.remedies import entropy_term, scheduled, with_losses
    from bavq.quantizers.searchless import FSQQuantizer, GumbelQuantizer
    from bavq.quantizers.vq_ema import VQEMAQuantizer
    from bavq.theory.metrics import compute_perplexity, compute_psnr, compute_usage_rate, dead_codes
    from bavq.training.checkpoints import load_model
    from bavq.training.experiments import run

__all__ = [
    "BAQuantizer",
    "BavqError",
    "FSQQuantizer",
    "GumbelQuantizer",
    "ProductQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "RunConfig",
    "VQEMAQuantizer",
    "VQVAE",
    "VQVAE2",
    "VectorQuantizer",
    "as_vector_quantize",
    "check_quantizer",
    "compute_perplexity",
    "compute_psnr",
    "compute_usage_rate",
    "dead_codes",
    "entropy_term",
    "evaluate",
    "from_vector_quantize",
    "load_model",
    "make_quantizer",
    "register_quantizer",
    "run",
    "scheduled",
    "with_losses",
]

# Each name is imported when it is first asked for: the command line answers a typo before torch is loaded.
_HOMES = {
    "bavq.core.config": "RunConfig",
    "bavq.core.errors": "BavqError",
    "bavq.evaluation.evaluate": "evaluate",
    "bavq.models.vqvae": "VQVAE",
    "bavq.models.vqvae2": "VQVAE2",
    "bavq.quantizers.adapters": "as_vector_quantize from_vector_quantize",
    "bavq.quantizers.ba_vq": "BAQuantizer",
    "bavq.quantizers.base": "Quantized Quantizer VectorQuantizer make_quantizer register_quantizer",
    "bavq.quantizers.composite": "ProductQuantizer ResidualQuantizer",
    "bavq.quantizers.contract": "check_quantizer",
    "bavq.quantizers.remedies": "entropy_term scheduled with_losses",
    "bavq.quantizers.searchless": "FSQQuantizer GumbelQuantizer",
    "bavq.quantizers.vq_ema": "VQEMAQuantizer",
    "bavq.theory.metrics": "compute_perplexity compute_psnr compute_usage_rate dead_codes",
    "bavq.training.checkpoints": "load_model",
    "bavq.training.experiments": "run",
}
_LATE = {name: home for home, names in _HOMES.items() for name in names.split()}
_PARTS = "core theory quantizers models training evaluation studies comparison".split()


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"bavq.{name}")
    if name not in _LATE:
        raise AttributeError(f"module 'bavq' has no attribute {name!r}")
    value = getattr(import_module(_LATE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE, *_PARTS})
