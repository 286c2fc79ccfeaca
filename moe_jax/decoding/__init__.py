"""From logits to text: sampling, incremental detokenisation, stop strings."""
