"""BLIP-2 over HTTP: OpenAI's chat and embeddings, the Open Inference Protocol, plain uploads, a gallery, and a page.

request ── middleware: key, size, slow bodies ──> route ── pictures: limits, decoding ──> pixel values [3, S, S]
        ── batching: what waits goes through the engines together ──> results ── route ──> response or events

`run.py` starts it. Only `blip2rt serve` imports this; it needs `pip install 'blip2rt[serve]'`.
"""
