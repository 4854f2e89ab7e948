"""Weights between Hugging Face folders and a Megatron model that is split over ranks."""
