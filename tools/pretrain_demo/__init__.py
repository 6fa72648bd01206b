"""Makes the demo model: a small cased BERT, pretrained on public-domain books."""
