"""From text on disk to batches: tokenizers, token shards, mixtures, packing."""
