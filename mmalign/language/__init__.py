"""Tokens and their log-probabilities, without models: the one rule by which answers are tokenised, and scores."""
