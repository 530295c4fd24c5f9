"""A trained model as a folder that anyone can use: written, described, loaded, shared."""
