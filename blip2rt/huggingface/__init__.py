"""An engine directory where transformers or optimum expect a model.

    from blip2rt.huggingface import Blip2ForConditionalGeneration, Blip2Processor   # in place of transformers'
    from blip2rt.huggingface.optimized import Blip2rtModelForImageTextToText        # an `optimum.OptimizedModel`

pictures, texts ── Blip2Processor ──> pixel_values [B, 3, S, S], input_ids [B, L], attention_mask [B, L]
                ── generate ────────> token ids, as transformers' `generate` lays them out

Nothing else imports this; it needs torch and transformers (`pip install 'blip2rt[export]'`).
"""

from .model import Blip2ForConditionalGeneration
from .processor import Blip2Processor

__all__ = ["Blip2ForConditionalGeneration", "Blip2Processor"]
