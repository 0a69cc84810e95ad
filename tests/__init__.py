"""Proofs that the package does what it says, on a CPU and without a network."""
