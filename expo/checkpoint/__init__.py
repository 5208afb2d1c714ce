"""What others wrote: model folders, their indexes, headers, tokenizers, pickles, and where on the hub a model is."""
