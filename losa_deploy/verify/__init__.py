"""Whether a folder is what it says, and an artifact the model it was made from."""
