"""Sources of text, tokenizers, prepared corpora, and the batches that are read from them."""
