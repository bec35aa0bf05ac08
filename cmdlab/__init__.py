"""Cross-Modal Denoising for speech–image retrieval: the library under the notebooks."""
