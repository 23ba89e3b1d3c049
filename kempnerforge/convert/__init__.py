"""Import and export of models; both compare logits."""
