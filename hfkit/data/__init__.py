"""From files and datasets to batches: readers, sources, duplicates, shards, order, batches."""
