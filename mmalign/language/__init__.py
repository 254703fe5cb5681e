"""Tokenization of prompts and responses, log-probabilities of tokens, and object words, without models."""
