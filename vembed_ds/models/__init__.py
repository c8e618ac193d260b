"""Embedding models: Hugging Face backbones, pooling, projections, composed towers."""
