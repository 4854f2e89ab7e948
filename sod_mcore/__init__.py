"""On-policy distillation of small tool-using language models on Megatron-Core, with SGLang."""
