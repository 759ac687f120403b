"""What `--model` can name, and how it is read: folders, GGUF files, models of the hub."""
