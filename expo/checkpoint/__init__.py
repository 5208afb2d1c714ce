"""Reading models: folders, indexes, headers, tokenizers, pickles, and models on the hub."""
