"""BertRT: optimised inference engines for BERT."""
