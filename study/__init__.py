"""Studies on the small base model: what a zero-prior token is worth, and two tokens in one training."""
