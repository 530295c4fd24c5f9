"""Search for better configs: spaces of dotted keys, and an Optuna study of them in a store."""
