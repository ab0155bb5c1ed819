"""Adapters for training libraries that build the DeepSpeed engine themselves."""
