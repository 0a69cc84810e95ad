"""Everything the demonstration needs that the package itself does not: a small base model and a data set."""
