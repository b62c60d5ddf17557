"""Vector quantizers that use their codebook, measured honestly: Blahut-Arimoto VQ beside VQ-EMA."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bavq.core.config import RunConfig
from bavq.core.errors import BavqError
from bavq.quantizers import specified as _specified  # noqa: F401, registers both forms
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

if TYPE_CHECKING:
    from bavq.evaluation.evaluate import evaluate
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

# What needs the libraries of training and evaluation is imported when it is first asked for.
_LATE = {
    "evaluate": "bavq.evaluation.evaluate",
    "load_model": "bavq.training.checkpoints",
    "run": "bavq.training.experiments",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'bavq' has no attribute {name!r}")
    value = getattr(import_module(_LATE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
