"""One run: a network and images in, scores out."""
