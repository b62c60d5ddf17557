"""Vector quantizers that use their codebook, measured honestly: Blahut-Arimoto VQ beside VQ-EMA."""

__version__ = "0.1.0"

from bavq.adapters import as_vector_quantize
from bavq.ba_vq import BAQuantizer
from bavq.composite import ProductQuantizer, ResidualQuantizer
from bavq.core import BavqError, RunConfig
from bavq.metrics import compute_perplexity, compute_psnr, compute_usage_rate, dead_codes
from bavq.quantizer import Quantized, Quantizer, VectorQuantizer, check_quantizer, make_quantizer, register_quantizer
from bavq.remedies import entropy_term, scheduled, with_losses
from bavq.searchless import FSQQuantizer, GumbelQuantizer
from bavq.vq_ema import VQEMAQuantizer
from bavq.vqvae import VQVAE, VQVAE2

__all__ = ["BAQuantizer", "BavqError", "FSQQuantizer", "GumbelQuantizer", "ProductQuantizer", "Quantized", "Quantizer",
           "ResidualQuantizer", "RunConfig", "VQEMAQuantizer", "VQVAE", "VQVAE2", "VectorQuantizer", "as_vector_quantize",
           "check_quantizer", "compute_perplexity", "compute_psnr", "compute_usage_rate", "dead_codes", "entropy_term",
           "make_quantizer", "register_quantizer", "scheduled", "with_losses"]
