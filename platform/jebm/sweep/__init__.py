"""Searching for better configs: spaces of dotted keys, and Optuna's study of them in a store."""
