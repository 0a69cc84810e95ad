"""The small base model that tests, demo and benchmarks run on, and the world of images that it was trained on."""
