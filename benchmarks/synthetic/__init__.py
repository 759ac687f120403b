"""Models of random weights with the sizes of real ones, for speed."""
