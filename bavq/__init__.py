"""Vector quantizers that use their codebook, measured honestly: Blahut-Arimoto VQ beside VQ-EMA."""

__version__ = "0.1.0"

from bavq.ba_vq import BAQuantizer
from bavq.core import BavqError, RunConfig
from bavq.metrics import compute_perplexity, compute_psnr, compute_usage_rate, dead_codes
from bavq.quantizer import Quantized, Quantizer, VectorQuantizer, check_quantizer, make_quantizer, register_quantizer
from bavq.vq_ema import VQEMAQuantizer
from bavq.vqvae import VQVAE

__all__ = ["BAQuantizer", "BavqError", "Quantized", "Quantizer", "RunConfig", "VQEMAQuantizer", "VQVAE", "VectorQuantizer",
           "check_quantizer", "compute_perplexity", "compute_psnr", "compute_usage_rate", "dead_codes", "make_quantizer", "register_quantizer"]
