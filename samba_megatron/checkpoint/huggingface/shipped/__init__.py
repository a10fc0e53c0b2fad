"""Configuration and model for transformers, copied beside every export."""
